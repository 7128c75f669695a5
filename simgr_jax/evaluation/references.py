"""Rankings to compare a model's with: popularity always, the oracle if the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from simgr_jax.data import synthetic
from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.models import popularity
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history

# The number of cases at a time: their [C, N] float64 probabilities have to fit in memory.
_ORACLE_BATCH = 1024


def reference_rankings(
    train: Sequences, num_items: int, cases: EvaluationCases, k: int, oracle_folder: Path | None
) -> dict[str, dict[str, Ranking]]:
    """Rankings of `cases` by name and protocol: "popularity" (training counts), and "oracle" for embedded data.

    Args:
      oracle_folder: the embedded data's folder; None if the truth is not known (`data.load.oracle_folder`).
    """
    rankings = {
        "popularity": {
            LEFT_IN: popularity.rank(train, num_items, cases.targets, k),
            FILTERED: popularity.rank_without_history(train, num_items, cases, k),
        }
    }
    if oracle_folder is not None:
        world = synthetic.oracle(oracle_folder)
        rankings["oracle"] = {
            LEFT_IN: _oracle(world, cases, k, lambda probabilities, histories: probabilities),
            FILTERED: _oracle(world, cases, k, _without_history),
        }
    return rankings


def _without_history(probabilities: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, histories))
    return without_history(probabilities, np.stack([np.pad(h, (0, longest - len(h)), "edge") for h in histories]))


def _oracle(world: synthetic.SyntheticWorld, cases: EvaluationCases, k: int, filtered: Callable) -> Ranking:
    """Ranks by the true p(i | history). No model can expect to do better."""
    parts = []
    for first in range(0, len(cases), _ORACLE_BATCH):
        histories = [cases.histories[case] for case in range(first, min(first + _ORACLE_BATCH, len(cases)))]
        scores = filtered(jax.numpy.asarray(world.next_item_probabilities(histories)), histories)
        parts.append(rank_catalog(scores, cases.targets[first : first + _ORACLE_BATCH], k))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
