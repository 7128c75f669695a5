"""Cross-entropy whose normaliser is estimated from a sample, for catalogs too large to score in full.

The cost of a step depends on the number of drawn items, M, not on the catalog. The estimate is importance sampling
(Bengio & Senécal, IEEE Transactions on Neural Networks 19(4), 2008).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simgr_jax.ops.similarity_loss import MASKED


class Negatives(NamedTuple):
    """M items drawn with replacement.

    Attributes:
      items: int32 [M].
      log_expected_counts: float32 [M], log(M q) of each item, where q is the probability that a draw yields it.
    """

    items: Int[Array, " M"]
    log_expected_counts: Float[Array, " M"]


def uniform_negatives(key: Array, num_items: int, count: int) -> Negatives:
    """`count` draws with equal probability for every item."""
    items = jax.random.randint(key, (count,), 0, num_items, jnp.int32)
    return Negatives(items, jnp.full(count, np.log(count / num_items), jnp.float32))


def cumulative_weights(item_counts: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The weights for `popularity_negatives`: int32 [N], the running sum of count + 1.

    Integers, because a float32 sum stops growing at 2²⁴. If the sum would overflow int32, the weights are scaled down
    and truncated to integers of at least 1.
    """
    weights = np.asarray(item_counts, np.int64) + 1
    largest = np.iinfo(np.int32).max
    if weights.sum() > largest:
        weights = np.maximum(1, (weights * ((largest - len(weights)) / weights.sum())).astype(np.int64))
    return np.cumsum(weights).astype(np.int32)


def popularity_negatives(key: Array, cumulative_weights: Int[Array, " N"], count: int) -> Negatives:
    """`count` draws with probabilities exactly proportional to the weights."""
    total = cumulative_weights[-1]
    points = jax.random.randint(key, (count,), 0, total, jnp.int32)
    items = jnp.searchsorted(cumulative_weights, points, side="right").astype(jnp.int32)
    below = jnp.where(items > 0, cumulative_weights[items - 1], 0)
    log_q = jnp.log((cumulative_weights[items] - below) / total)
    return Negatives(items, np.log(count) + log_q)


def sampled_cross_entropy(
    user_states: Float[Array, "B D"],
    target_vectors: Float[Array, "B D"],
    targets: Int[Array, " B"],
    negatives: Negatives,
    negative_vectors: Float[Array, "M D"],
    num_items: int,
    temperature: Float[Array, ""] | float,
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """`similarity_loss.full_catalog_cross_entropy` with the sums over the catalog estimated from the negatives.

    The normaliser is exp(u·v_t / τ) + Σ_{j ≠ t} exp(u·v_j / τ) / (M q_j). The target's term has no correction, because
    the target was not drawn (Khrylchenko et al., RecSys 2025, arXiv 2507.09331); each draw of another item is divided
    by its expected count. The estimate is unbiased. Its logarithm is biased downward, less so as M grows.

    Args:
      negative_vectors: vectors of `negatives.items` in the similarity's space, shared by all rows.
      num_items: the size of the whole catalog.
      label_smoothing: ε; the mean logit over the catalog is estimated in the same way.
    """
    scaled = user_states / temperature
    target_logits = jnp.sum(scaled * target_vectors, axis=-1)
    logits = scaled @ negative_vectors.T - negatives.log_expected_counts
    logits = jnp.where(targets[:, None] == negatives.items, MASKED, logits)
    log_normalizer = jnp.logaddexp(target_logits, jax.nn.logsumexp(logits, axis=-1))
    mean_vector = jnp.exp(-negatives.log_expected_counts) @ negative_vectors / num_items
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * (scaled @ mean_vector)
