"""Accuracy for slices of the evaluation cases: by the target's popularity, and by the history's length."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation import metrics

POPULARITY_SLICES = ("unseen", "tail", "middle", "head")
HISTORY_SLICES = ("1-3", "4-5", "6-10", "11-20", "21+")


def popularity_slices(targets: Int[np.ndarray, " C"], train: Sequences, num_items: int) -> Int[np.ndarray, " C"]:
    """The index into `POPULARITY_SLICES` of each target, int64 [C].

    `unseen` items never occur in training. The others are sorted by their training interactions: the most popular
    items, with a third of all interactions, are the `head`, the next third is the `middle` and the rest the `tail`. The
    head thus has few items and the tail many. Items with equal counts are in the same slice.
    """
    counts = np.bincount(train.values, minlength=num_items)
    rising = np.sort(counts)
    cumulative = np.concatenate([[0], np.cumsum(rising)])
    total = cumulative[-1]
    of_more_popular = total - cumulative[np.searchsorted(rising, counts[targets], side="right")]
    third = np.select([3 * of_more_popular < total, 3 * of_more_popular < 2 * total], [3, 2], default=1)
    return np.where(counts[targets] == 0, 0, third)


def history_slices(histories: Sequences) -> Int[np.ndarray, " C"]:
    """The index into `HISTORY_SLICES` of each history by its full length, int64 [C]."""
    return np.searchsorted([3, 5, 10, 20], histories.lengths, side="left")


def slice_metrics(
    target_ranks: Float[np.ndarray, " C"], cases: EvaluationCases, train: Sequences, num_items: int
) -> list[dict[str, Any]]:
    """HR@10 and NDCG@10 within each slice that has cases.

    Returns:
      Dicts with `by` ("target popularity" or "history length"), `slice` (its name), `num_cases`,
      `HR@10` and `NDCG@10`.
    """
    groups = (
        ("target popularity", POPULARITY_SLICES, popularity_slices(cases.targets, train, num_items)),
        ("history length", HISTORY_SLICES, history_slices(cases.histories)),
    )
    rows = []
    for by, names, members in groups:
        for index, name in enumerate(names):
            ranks = np.asarray(target_ranks)[members == index]
            if len(ranks):
                accuracy = {"HR@10": metrics.hits(ranks, 10), "NDCG@10": metrics.gains(ranks, 10)}
                means = {metric: float(values.mean()) for metric, values in accuracy.items()}
                rows.append({"by": by, "slice": name, "num_cases": len(ranks), **means})
    return rows
