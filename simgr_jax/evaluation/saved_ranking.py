"""A report's `ranking.npz`: the lists and ranks of every case, so that comparisons need not rank again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.errors import UserError
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.ops.top_k import Ranking
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import load_arrays

RANKING_FILE = "ranking.npz"


class CaseRankings(NamedTuple):
    """
    Attributes:
      items: int32 [C, K], the lists with history items left in, -1 in empty slots.
      target_rank: float32 [C].
      filtered_items, filtered_target_rank: the same with history items taken out.
      users: int32 [C], each case's user.
      targets: int32 [C], each case's target.
    """

    items: np.ndarray
    target_rank: np.ndarray
    filtered_items: np.ndarray
    filtered_target_rank: np.ndarray
    users: np.ndarray
    targets: np.ndarray

    def is_of(self, cases: EvaluationCases) -> bool:
        """Whether these are the cases that were ranked."""
        return np.array_equal(self.users, cases.users) and np.array_equal(self.targets, cases.targets)

    def by_protocol(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(target_rank, items) of each of `protocols.PROTOCOLS`."""
        return {
            LEFT_IN: (self.target_rank, self.items),
            FILTERED: (self.filtered_target_rank, self.filtered_items),
        }


def write(report: Path, rankings: Mapping[str, Ranking], cases: EvaluationCases) -> None:
    """Writes `ranking.npz`.

    Args:
      report: a run's report folder.
      rankings: the model's, by protocol.
    """
    arrays = []
    for protocol in (LEFT_IN, FILTERED):
        ranking = rankings[protocol]
        arrays += [np.asarray(ranking.items, np.int32), np.asarray(ranking.target_rank, np.float32)]
    with atomic_path(report / RANKING_FILE) as temporary:
        np.savez(temporary, **CaseRankings(*arrays, cases.users, cases.targets)._asdict())


def read(report: Path) -> CaseRankings:
    """What `write` wrote.

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
