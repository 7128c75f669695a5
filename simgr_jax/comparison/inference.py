"""How many users a second trained models rank the catalog for, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from simgr_jax.comparison.trained import Trained, restore
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.preparation import open_mesh


class Speeds(NamedTuple):
    """Of one model, a value a round.

    Attributes:
      users_per_second: from histories to lists of 10 items on the host, with what was computed of the catalog at hand.
      catalog_seconds: what is computed of the catalog, once for all users: SimGR's item vectors, the graph of RPG's
        graph search.
    """

    users_per_second: list[float]
    catalog_seconds: list[float]


def measure(
    workdirs: Mapping[str, Path], places: Mapping[str, str], *, batch_size: int, batches: int, rounds: int
) -> tuple[int, dict[str, Speeds]]:
    """Measures the best checkpoints of runs in this process, one after the other in each round, so that whatever slows
    the machine down for a while slows all of them. Everything is compiled before the first round.

    Args:
      workdirs: of finished runs, by name.
      places: what is not where the runs' configs have it, by full key.
      batch_size: users ranked at once, for all alike.
      batches: how many of them a round has, as far as the test split has as many users.

    Returns:
      The number of users in a round, and each name's speeds.
    """
    values = {**places, "evaluation.batch_size": batch_size}
    models = {name: restore(workdir, values) for name, workdir in workdirs.items()}
    # The first of the test split.
    cases = {name: trained.prepared.split.test for name, trained in models.items()}
    cases = {name: one.take(range(min(batch_size * batches, len(one)))) for name, one in cases.items()}
    for name, trained in models.items():
        _round(trained, cases[name])
    speeds = {name: Speeds([], []) for name in workdirs}
    for number in range(rounds):
        # To and fro: none always comes after the same other.
        for name in list(models)[:: 1 if number % 2 == 0 else -1]:
            catalog_seconds, seconds = _round(models[name], cases[name])
            speeds[name].catalog_seconds.append(catalog_seconds)
            speeds[name].users_per_second.append(len(cases[name]) / seconds)
    return min(map(len, cases.values())), speeds


def _round(trained: Trained, cases: EvaluationCases) -> tuple[float, float]:
    """Ranks once. Returns the seconds that the catalog's part and the users' took."""
    ranker, state = trained.prepared.ranker, (trained.params, trained.rest)
    # Lists alone: a service knows no target to rank.
    with open_mesh(trained.config):
        start = time.perf_counter()
        catalog = jax.block_until_ready(ranker.catalog(*state))
        middle = time.perf_counter()
        ranker.lists(*state, cases, catalog)
        return middle - start, time.perf_counter() - middle
