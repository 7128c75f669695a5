"""Rankings that set the scale beside a model's: popularity always, the oracle where the truth is known."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from simgr_jax.data import synthetic
from simgr_jax.data.dataset import Dataset, EvaluationCases, Split
from simgr_jax.evaluation.metrics import LIST_LENGTH
from simgr_jax.models import popularity
from simgr_jax.ops.top_k import Ranking, rank_catalog

# [C, N] float64 probabilities at a time.
_ORACLE_BATCH = 1024


def reference_rankings(
    dataset: Dataset, split: Split, cases: EvaluationCases, oracle_folder: Path | None
) -> dict[str, Ranking]:
    """Rankings of `cases` by name: "popularity" (counts in training), and "oracle" for embedded data.

    Args:
      oracle_folder: where the embedded data lie, None where the truth is not known (`data.load.oracle_folder`).
    """
    rankings = {"popularity": popularity.rank(split.train, dataset.num_items, cases.targets, LIST_LENGTH)}
    if oracle_folder is not None:
        rankings["oracle"] = _oracle(synthetic.oracle(oracle_folder), cases)
    return rankings


def _oracle(world: synthetic.SyntheticWorld, cases: EvaluationCases) -> Ranking:
    """Ranks by the true p(i | history): no model can expect to do better."""
    parts = []
    for first in range(0, len(cases), _ORACLE_BATCH):
        chosen = range(first, min(first + _ORACLE_BATCH, len(cases)))
        probabilities = world.next_item_probabilities([cases.histories[case] for case in chosen])
        parts.append(rank_catalog(probabilities, cases.targets[first : first + _ORACLE_BATCH], LIST_LENGTH))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
