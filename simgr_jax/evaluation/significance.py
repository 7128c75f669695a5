"""Tests whether two models' mean accuracy differs by more than the choice of users explains.

Both models answered the same cases, so they are compared user by user. The test is a permutation test (Fisher 1935; for
rankings, Smucker, Allan & Carterette 2007): if the models were equal, each user's difference might as well have the
other sign. It tests the means that the table shows and assumes no distribution, which suits gains that are mostly zero
and far from normal. Wilcoxon's test would compare ranks of differences, not their mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 9999


class Difference(NamedTuple):
    """How much higher a model's mean is than the reference's.

    Attributes:
      mean: the mean of the cases' differences.
      ci95_low, ci95_high: 1.96 standard errors around it.
      p: the two-sided p-value of the permutation test.
    """

    mean: float
    ci95_low: float
    ci95_high: float
    p: float


def paired_difference(
    values: Float[np.ndarray, " C"],
    reference: Float[np.ndarray, " C"],
    users: Int[np.ndarray, " C"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Tests the mean of `values - reference`.

    Args:
      values, reference: what each model gained in each case, like `metrics.gains`.
      users: each case's user, at least two in all. A user's cases are correlated, so they change sign together.
      resamples: how many choices of signs are drawn; the smallest possible p is 1 / (resamples + 1).
      seed: for the draws.
    """
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    names, users = np.unique(users, return_inverse=True)
    if not values.shape == reference.shape == users.shape or values.ndim != 1 or len(names) < 2:
        raise ValueError(
            f"need the same cases of both, of two users or more: {values.shape}, {reference.shape}, {users.shape}"
        )
    differences = values - reference
    mean = differences.mean()
    # The standard error of a mean over clustered cases; with one case per user it is the ordinary one.
    deviations = np.bincount(users, differences - mean)
    error = np.sqrt(len(names) / (len(names) - 1) * np.sum(deviations**2)) / len(differences)
    p = _sign_flip_p(np.bincount(users, differences), resamples, seed)
    return Difference(float(mean), float(mean - 1.96 * error), float(mean + 1.96 * error), p)


def _sign_flip_p(differences: Float[np.ndarray, " U"], resamples: int, seed: int, chunk: int = 500) -> float:
    """The p-value. Draws `chunk` choices of signs at a time, which bounds memory at chunk * U."""
    # A difference of zero is the same with either sign.
    differing = differences[differences != 0]
    generator = np.random.default_rng(seed)
    # Sums that equal the observed one up to rounding count as large.
    observed = abs(differing.sum()) * (1 - 1e-9)
    as_large = 0
    for start in range(0, resamples, chunk):
        signs = generator.choice(np.array([-1, 1], np.int8), size=(min(chunk, resamples - start), len(differing)))
        as_large += np.count_nonzero(np.abs(signs @ differing) >= observed)
    # The observed signs are one of the possible choices; counting them makes the test exact.
    return float((1 + as_large) / (1 + resamples))


def holm(p_values: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Holm's (1979) adjusted p-values of M tests. Rejecting below .05 makes any false rejection at most 5% likely."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return adjusted
