"""How many users a second trained models rank the catalog for, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from simgr_jax.comparison.trained import Trained, restore
from simgr_jax.preparation import open_mesh


def users_per_second(
    workdirs: Mapping[str, Path], *, batch_size: int, batches: int, rounds: int
) -> tuple[int, dict[str, list[float]]]:
    """Measures the best checkpoints of runs in this process, one after the other in each round, so that whatever slows
    the machine down for a while slows all of them.

    What is timed begins with histories and ends with lists of 10 items on the host. The catalog's part (for SimGR: all
    item vectors) is computed once a round. Everything is compiled before the first round.

    Args:
      workdirs: of finished runs, by name.
      batch_size: users ranked at once, for all alike.
      batches: how many of them a round has, as far as the test split has as many users.

    Returns:
      The number of users in a round, and each name's users per second in each round.
    """
    rankers = {name: _ranker(restore(workdir, batch_size), batch_size * batches) for name, workdir in workdirs.items()}
    counts = {name: rank() for name, rank in rankers.items()}
    speeds: dict[str, list[float]] = {name: [] for name in workdirs}
    for number in range(rounds):
        # To and fro: none always comes after the same other.
        for name, rank in list(rankers.items())[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            rank()
            speeds[name].append(counts[name] / (time.perf_counter() - start))
    return min(counts.values()), speeds


def _ranker(trained: Trained, users: int) -> Callable[[], int]:
    """Ranks the first users of the test split, and returns how many."""
    cases = trained.prepared.split.test
    cases = cases.take(range(min(users, len(cases))))

    def rank() -> int:
        with open_mesh(trained.config):
            return len(trained.prepared.ranker(trained.params, trained.rest, cases).items)

    return rank
