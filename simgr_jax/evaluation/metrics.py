"""Full-catalog ranking metrics with one target per case, and their confidence intervals.

Every metric is computed from two arrays: the targets' ranks (from 1; tied items share the mean of their ranks; inf
where a recommender doesn't place the target) and the recommended items (-1 fills a shorter list).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

# The K of HR@K and NDCG@K in a report, unless `config.evaluation.ks` says otherwise.
DEFAULT_KS = (1, 5, 10)
# Validation NDCG@10 selects the checkpoint. Entropy and coverage count the same top 10.
SELECTION_K = 10
SELECTION_METRIC = f"NDCG@{SELECTION_K}"


class Metric(NamedTuple):
    """
    Attributes:
      name: like "HR@10".
      of_ranks: maps target ranks to the values of single cases, whose mean is the metric. None for a metric of all
        lists together.
      highest: maps the catalog's size N to the largest value that the metric can have; the smallest is 0.
    """

    name: str
    of_ranks: Callable[[np.ndarray], np.ndarray] | None
    highest: Callable[[int], float]


def hits(target_ranks: Float[np.ndarray, " C"], k: int) -> Float[np.ndarray, " C"]:
    """1 where the target is in the top k, else 0; the mean is HR@k, which is Recall@k with one target."""
    return (np.asarray(target_ranks) <= k).astype(np.float64)


def gains(target_ranks: Float[np.ndarray, " C"], k: int) -> Float[np.ndarray, " C"]:
    """1 / log2(1 + rank) where the target is in the top k, else 0; the mean is NDCG@k."""
    ranks = np.asarray(target_ranks, dtype=np.float64)
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def metrics(ks: Sequence[int] = DEFAULT_KS) -> list[Metric]:
    """The metrics of a report: HR@K and NDCG@K for each K, then entropy@10 and coverage@10.

    NDCG@1 is left out, as it equals HR@1.
    """
    one = lambda num_items: 1.0  # noqa: E731
    return [
        *(Metric(f"HR@{k}", partial(hits, k=k), one) for k in ks),
        *(Metric(f"NDCG@{k}", partial(gains, k=k), one) for k in ks if k > 1),
        Metric(f"entropy@{SELECTION_K}", None, math.log),
        Metric(f"coverage@{SELECTION_K}", None, one),
    ]


def names(ks: Sequence[int] = DEFAULT_KS) -> list[str]:
    """The names of `metrics`."""
    return [metric.name for metric in metrics(ks)]


def exposure(items: Int[np.ndarray, "C K"], num_items: int) -> Int[np.ndarray, " N"]:
    """int64 [N], how many of all top-10 slots each item fills."""
    top = np.asarray(items)[:, :SELECTION_K]
    return np.bincount(top[top >= 0], minlength=num_items)


def shows_everybody_the_same(items: Int[np.ndarray, "C K"], targets: Int[np.ndarray, " C"], num_items: int) -> bool:
    """Whether the top-10 lists are nearly the same for all cases, although the targets are not: then the model ranks by
    popularity.

    Lists and targets are compared by their effective number of items, exp(entropy). Equal lists have 10.
    """
    shown = np.exp(entropy(exposure(items, num_items)))
    wanted = np.exp(entropy(np.bincount(targets, minlength=num_items)))
    return bool(shown < 2 * SELECTION_K and wanted > 10 * SELECTION_K)


def entropy(counts: Float[np.ndarray, "... N"]) -> Float[np.ndarray, " ..."]:
    """Shannon entropy in nats of the items' shares of `counts`, along the last axis; 0 where nothing is counted."""
    total = np.maximum(counts.sum(axis=-1), 1)
    # -Σ (c/t) log(c/t) = log t - Σ c log c / t, which needs one pass and no division per item.
    return np.log(total) - np.sum(counts * np.log(np.maximum(counts, 1)), axis=-1) / total


def summarize(
    target_ranks: Float[np.ndarray, " C"],
    items: Int[np.ndarray, "C K"],
    num_items: int,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """The value of every metric over C evaluation cases.

    Args:
      target_ranks: float [C].
      items: int [C, K], the recommended items, best first, -1 in empty slots; K is at least the largest of `ks`.
      num_items: the size N of the catalog.

    Returns:
      By name: HR@K, the share of targets ranked K or better; NDCG@K, the mean gain 1 / log2(1 + rank) up to rank K;
      entropy@10, in nats, of the items' shares of all filled top-10 slots; coverage@10, the share of the catalog that
      fills any slot.
    """
    _check(target_ranks, items, num_items, ks)
    counts = exposure(items, num_items)
    values = [*_of_cases(target_ranks, ks).mean(axis=0), entropy(counts), np.mean(counts > 0)]
    return dict(zip(names(ks), map(float, values), strict=True))


def confidence_intervals(
    target_ranks: Float[np.ndarray, " C"],
    items: Int[np.ndarray, "C K"],
    num_items: int,
    users: Int[np.ndarray, " C"],
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """95% bootstrap intervals over users (the standard normal interval of Efron & Tibshirani 1993).

    Every interval is the estimate ± 1.96 standard deviations of the metric over the resamples, cut at the metric's
    bounds. Percentile intervals would suit HR and NDCG, which are means, but not coverage and entropy. A resample has
    only about 63% of the users, so its coverage never exceeds the estimate, and its entropy tends to be lower. A
    percentile interval can thus miss the estimate. The spread suffers much less, so all metrics use only the spread.

    Coverage's interval is rough, because it depends on items shown once or never, about which a resample says little.
    In simulations with fresh users it was up to twice too wide, or a quarter too narrow.

    Args:
      target_ranks, items, num_items: as for `summarize`.
      users: each case's user. A user's cases are correlated, so they are drawn together.

    Returns:
      `METRIC/ci95_low` and `METRIC/ci95_high` for each metric.
    """
    estimates = summarize(target_ranks, items, num_items, ks)
    drawn = resample(target_ranks, items, num_items, users, ks)
    return intervals_around(estimates, drawn.std(axis=0, ddof=1), num_items, ks)


def intervals_around(
    estimates: Mapping[str, float],
    deviations: Float[np.ndarray, " metrics"],
    num_items: int,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """`METRIC/ci95_low` and `METRIC/ci95_high`: 1.96 deviations around each estimate, cut at the metric's bounds."""
    intervals = {}
    for metric, deviation in zip(metrics(ks), deviations, strict=True):
        estimate = estimates[metric.name]
        intervals[f"{metric.name}/ci95_low"] = float(max(estimate - 1.96 * deviation, 0.0))
        intervals[f"{metric.name}/ci95_high"] = float(min(estimate + 1.96 * deviation, metric.highest(num_items)))
    return intervals


def resample(
    target_ranks: Float[np.ndarray, " C"],
    items: Int[np.ndarray, "C K"],
    num_items: int,
    users: Int[np.ndarray, " C"],
    ks: Sequence[int] = DEFAULT_KS,
    *,
    resamples: int = 1000,
    seed: int = 0,
    chunk: int = 50,
) -> Float[np.ndarray, "resamples metrics"]:
    """The metrics of bootstrap resamples. With equal users and seed, the n-th resample draws the same users for every
    ranking.

    Args:
      target_ranks, items, num_items, users: as for `confidence_intervals`.
      resamples: how many; each draws as many users as there are, with replacement.
      chunk: resamples computed at once; memory is bounded by chunk * (C + N).
    """
    generator = np.random.default_rng(seed)
    of_cases = _of_cases(target_ranks, ks)
    names, users = np.unique(users, return_inverse=True)
    num_users = len(names)
    top = np.asarray(items)[:, :SELECTION_K]
    cases, slots = np.nonzero(top >= 0)
    recommended = scipy.sparse.csr_array(
        (np.ones(len(cases)), (top[cases, slots], cases)), shape=(num_items, len(of_cases))
    )  # [N, C]
    values = []
    for start in range(0, resamples, chunk):
        draws = generator.integers(0, num_users, size=(min(chunk, resamples - start), num_users))
        weights = np.stack([np.bincount(row, minlength=num_users)[users] for row in draws]).astype(np.float64)
        counts = (recommended @ weights.T).T
        of_lists = entropy(counts), np.mean(counts > 0, axis=1)
        values.append(np.column_stack([weights @ of_cases / weights.sum(axis=1, keepdims=True), *of_lists]))
    return np.concatenate(values)


def _of_cases(target_ranks: np.ndarray, ks: Sequence[int]) -> Float[np.ndarray, "C metrics"]:
    """The values of single cases, for the metrics that are means of them."""
    return np.column_stack([metric.of_ranks(target_ranks) for metric in metrics(ks) if metric.of_ranks])


def _check(target_ranks: np.ndarray, items: np.ndarray, num_items: int, ks: Sequence[int]) -> None:
    ranks, items = np.asarray(target_ranks), np.asarray(items)
    if not len(ranks) or ranks.shape != items.shape[:1] or items.shape[1] < max(ks):
        raise ValueError(f"need ranks [C > 0] and items [C, K >= {max(ks)}], got {ranks.shape} and {items.shape}")
    if np.isnan(ranks).any() or ranks.min() < 1:
        raise ValueError("ranks are counted from 1 and can't be NaN")
    if items.min() < -1 or items.max() >= num_items:
        raise ValueError(f"items outside -1..{num_items - 1}")
