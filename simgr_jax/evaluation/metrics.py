"""Full-catalog ranking metrics with one target a case, and their confidence intervals.

Every metric is computed from two arrays: the targets' ranks (from 1, ties given the mean of the ranks they share, inf
where a recommender doesn't place the target) and the recommended items (-1 fills a list that is shorter).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

LIST_LENGTH = 10
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "entropy@10", "coverage@10")


def hits(target_ranks: Float[np.ndarray, " C"], k: int) -> Float[np.ndarray, " C"]:
    """1 where the target is in the top k, else 0; the mean is HR@k, which is Recall@k with one target."""
    return (np.asarray(target_ranks) <= k).astype(np.float64)


def gains(target_ranks: Float[np.ndarray, " C"], k: int) -> Float[np.ndarray, " C"]:
    """1 / log2(1 + rank) where the target is in the top k, else 0; the mean is NDCG@k."""
    ranks = np.asarray(target_ranks, dtype=np.float64)
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def exposure(items: Int[np.ndarray, "C K"], num_items: int) -> Int[np.ndarray, " N"]:
    """int64 [N], how many of all top-10 slots each item fills."""
    top = np.asarray(items)[:, :LIST_LENGTH]
    return np.bincount(top[top >= 0], minlength=num_items)


def entropy(counts: Float[np.ndarray, "... N"]) -> Float[np.ndarray, " ..."]:
    """Shannon entropy in nats of the items' shares of `counts`, along the last axis; 0 where nothing is counted."""
    total = np.maximum(counts.sum(axis=-1), 1)
    # -Σ (c/t) log(c/t) = log t - Σ c log c / t, which needs one pass and no division by item.
    return np.log(total) - np.sum(counts * np.log(np.maximum(counts, 1)), axis=-1) / total


def summarize(target_ranks: Float[np.ndarray, " C"], items: Int[np.ndarray, "C K"], num_items: int) -> dict[str, float]:
    """HR, NDCG, entropy and coverage over C evaluation cases.

    Args:
      target_ranks: float [C].
      items: int [C, K >= 10], the recommended items, best first, -1 in empty slots.
      num_items: the size N of the catalog.

    Returns:
      A float for each of `METRICS`: HR@K, the share of targets ranked K or better; NDCG@K, the mean gain
      1 / log2(1 + rank) up to rank K; entropy@10, in nats, of the items' shares of all filled top-10 slots;
      coverage@10, the share of the catalog that fills any.
    """
    _check(target_ranks, items, num_items)
    means = _accuracy(target_ranks).mean(axis=0)
    counts = exposure(items, num_items)
    return dict(zip(METRICS, map(float, [*means, entropy(counts), np.mean(counts > 0)]), strict=True))


def confidence_intervals(
    target_ranks: Float[np.ndarray, " C"],
    items: Int[np.ndarray, "C K"],
    num_items: int,
    users: Int[np.ndarray, " C"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """95% bootstrap intervals over users (the standard normal interval of Efron & Tibshirani 1993).

    Every interval is the estimate ± 1.96 standard deviations of the metric over the resamples, cut at the metric's
    bounds. The percentile interval would do for HR and NDCG, which are means, but not for coverage and entropy: a
    resample draws only about 63% of the users, so its coverage never exceeds theirs, its entropy tends to be lower,
    and the percentile interval can miss the estimate itself. The spread suffers much less, so all metrics use the
    spread alone. Take coverage's interval as rough: it turns on items shown once or never, of which a resample knows
    little, and in simulations with fresh users it was up to twice too wide, or a quarter too narrow.

    Args:
      target_ranks, items, num_items: as for `summarize`.
      users: whose cases they are; a user's cases are alike, and drawn together.
      resamples: how many times as many users are drawn with replacement.
      seed: of the draws.

    Returns:
      `METRIC/ci95_low` and `METRIC/ci95_high` for each of `METRICS`.
    """
    estimates = summarize(target_ranks, items, num_items)
    drawn = resample(target_ranks, items, num_items, users, resamples=resamples, seed=seed)
    return intervals_around(estimates, drawn.std(axis=0, ddof=1), num_items)


def intervals_around(
    estimates: Mapping[str, float], deviations: Float[np.ndarray, " metrics"], num_items: int
) -> dict[str, float]:
    """`METRIC/ci95_low` and `METRIC/ci95_high`: 1.96 deviations around each of `METRICS`, cut at its bounds."""
    intervals = {}
    for name, deviation in zip(METRICS, deviations, strict=True):
        estimate = estimates[name]
        highest = np.log(num_items) if name.startswith("entropy") else 1.0
        intervals[f"{name}/ci95_low"] = float(max(estimate - 1.96 * deviation, 0.0))
        intervals[f"{name}/ci95_high"] = float(min(estimate + 1.96 * deviation, highest))
    return intervals


def resample(
    target_ranks: Float[np.ndarray, " C"],
    items: Int[np.ndarray, "C K"],
    num_items: int,
    users: Int[np.ndarray, " C"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    chunk: int = 50,
) -> Float[np.ndarray, "resamples metrics"]:
    """`METRICS` of bootstrap resamples; with equal users and seed, the n-th draws the same of other rankings.

    Args:
      target_ranks, items, num_items, users: as for `confidence_intervals`.
      chunk: how many resamples at a time, which bounds memory at chunk * (C + N).
    """
    generator = np.random.default_rng(seed)
    accuracy = _accuracy(target_ranks)
    num_cases = len(accuracy)
    names, users = np.unique(users, return_inverse=True)
    num_users = len(names)
    top = np.asarray(items)[:, :LIST_LENGTH]
    cases, slots = np.nonzero(top >= 0)
    recommended = scipy.sparse.csr_array(
        (np.ones(len(cases)), (top[cases, slots], cases)), shape=(num_items, num_cases)
    )  # [N, C]
    metrics = []
    for start in range(0, resamples, chunk):
        draws = generator.integers(0, num_users, size=(min(chunk, resamples - start), num_users))
        weights = np.stack([np.bincount(row, minlength=num_users)[users] for row in draws]).astype(np.float64)
        counts = (recommended @ weights.T).T
        shape = entropy(counts), np.mean(counts > 0, axis=1)
        metrics.append(np.column_stack([weights @ accuracy / weights.sum(axis=1, keepdims=True), *shape]))
    return np.concatenate(metrics)


def _accuracy(target_ranks: np.ndarray) -> Float[np.ndarray, "C 5"]:
    """The per-case values whose means are the first five of `METRICS`."""
    return np.column_stack([*(hits(target_ranks, k) for k in (1, 5, 10)), *(gains(target_ranks, k) for k in (5, 10))])


def _check(target_ranks: np.ndarray, items: np.ndarray, num_items: int) -> None:
    ranks, items = np.asarray(target_ranks), np.asarray(items)
    if not len(ranks) or ranks.shape != items.shape[:1] or items.shape[1] < LIST_LENGTH:
        raise ValueError(f"need ranks [C > 0] and items [C, K >= {LIST_LENGTH}], got {ranks.shape} and {items.shape}")
    if np.isnan(ranks).any() or ranks.min() < 1:
        raise ValueError("ranks are counted from 1 and can't be NaN")
    if items.min() < -1 or items.max() >= num_items:
        raise ValueError(f"items outside -1..{num_items - 1}")
