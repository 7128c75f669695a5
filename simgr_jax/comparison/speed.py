"""Measures how many users per second trained models can rank the catalog for, side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.evaluation.metrics import SELECTION_K
from simgr_jax.run import Run


class Speeds(NamedTuple):
    """One model's speeds, a value per round.

    Attributes:
      users_per_second: from histories to lists of 10 items on the host, without the catalog's part.
      catalog_seconds: the time of the catalog's part, which is computed once for all users: SimGR's item vectors, the
        graph of RPG's graph search.
    """

    users_per_second: list[float]
    catalog_seconds: list[float]


def measure(runs: Mapping[str, Run], *, batches: int, rounds: int) -> tuple[int, dict[str, Speeds]]:
    """Measures the best checkpoints of runs in this process, one after the other in each round, so that whatever slows
    the machine down for a while slows all of them. Everything is compiled before the first round.

    Args:
      runs: finished runs by name; all rank `config.evaluation.batch_size` users at once.
      batches: the number of batches in a round, or fewer if the test split has fewer users.

    Returns:
      The number of users in a round, and each name's speeds.
    """
    cases = {}
    for name, run in runs.items():
        # The first users of the test split.
        users = min(run.config.evaluation.batch_size * batches, len(run.split.test))
        cases[name] = run.split.test.take(range(users))
        _round(run, cases[name])
    speeds = {name: Speeds([], []) for name in runs}
    for number in range(rounds):
        # Forwards, then backwards, so that no model always runs after the same other one.
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            catalog_seconds, seconds = _round(runs[name], cases[name])
            speeds[name].catalog_seconds.append(catalog_seconds)
            speeds[name].users_per_second.append(len(cases[name]) / seconds)
    return min(map(len, cases.values())), speeds


def _round(run: Run, cases: EvaluationCases) -> tuple[float, float]:
    """Ranks once. Returns the seconds for the catalog's part and for the users' part."""
    model, ranker = run.best_model(), run.ranker
    # Only lists, because a service knows no target to rank.
    with run.mesh():
        start = time.perf_counter()
        catalog = jax.block_until_ready(ranker.catalog(model))
        middle = time.perf_counter()
        ranker.lists(model, cases, SELECTION_K, catalog=catalog)
        return middle - start, time.perf_counter() - middle
