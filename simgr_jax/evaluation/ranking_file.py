"""A report's `ranking.npz`: what comparisons need, case by case, so that nobody ranks again for them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from simgr_jax.cache import atomic_path, load_arrays
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.errors import UserError
from simgr_jax.evaluation.metrics import LIST_LENGTH
from simgr_jax.ops.top_k import Ranking

RANKING_FILE = "ranking.npz"


class CaseRankings(NamedTuple):
    """
    Attributes:
      items: int32 [C, 10], the lists, -1 in empty slots.
      target_rank: float32 [C].
      users: int32 [C], whose case it is.
      targets: int32 [C], the item asked for.
    """

    items: np.ndarray
    target_rank: np.ndarray
    users: np.ndarray
    targets: np.ndarray

    def is_of(self, cases: EvaluationCases) -> bool:
        return np.array_equal(self.users, cases.users) and np.array_equal(self.targets, cases.targets)


def write(report: Path, ranking: Ranking, cases: EvaluationCases) -> None:
    """report: a run's folder of that name."""
    items = np.asarray(ranking.items, np.int32)[:, :LIST_LENGTH]
    kept = CaseRankings(items, np.asarray(ranking.target_rank, np.float32), cases.users, cases.targets)
    with atomic_path(report / RANKING_FILE) as temporary:
        np.savez(temporary, **kept._asdict())


def read(report: Path) -> CaseRankings:
    """report: a run's folder of that name.

    Raises:
      UserError: the file is missing, damaged, or of another version.
    """
    try:
        arrays = load_arrays(report / RANKING_FILE)
        return CaseRankings(**{name: arrays[name] for name in CaseRankings._fields})
    except (UserError, KeyError):
        raise UserError(
            f"{report / RANKING_FILE}: is missing, damaged or of another version; run simgr_jax.evaluate "
            f"--workdir={report.parent}"
        ) from None
