"""Cross-entropy over item similarities: over the full catalog, within the batch, or both.

All functions take user states and item vectors that are already in the similarity's space (see `to_similarity_space`),
so that a similarity is a dot product, and return float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SIMILARITIES = ("cosine", "dot")

# Finite, so that a masked logit never turns a gradient into NaN.
MASKED = -1e30


def to_similarity_space(vectors: Float[Array, "*B D"], similarity: str) -> Float[Array, "*B D"]:
    """Float32 vectors whose dot product is the similarity: unit length for "cosine", unchanged for "dot".

    The epsilon is inside the root, so the gradient of a zero vector is finite.
    """
    vectors = vectors.astype(jnp.float32)
    if similarity == "cosine":
        return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)
    return vectors


def mean_of_valid(losses: Float[Array, "*B"], valid: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean of the valid losses; 0 if none is valid."""
    return jnp.sum(losses, where=valid) / jnp.maximum(jnp.sum(valid), 1)


def full_catalog_cross_entropy(
    user_states: Float[Array, "B D"],
    item_vectors: Float[Array, "N D"],
    targets: Int[Array, " B"],
    temperature: Float[Array, ""] | float,
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """-log p(target | u), p(i | u) = exp(u·v_i / τ) / Σ_j exp(u·v_j / τ) over all N items (SimGR, arXiv 2602.07847).

    With label smoothing ε the target distribution is (1 - ε) on the target plus ε / N on every item.
    """
    scaled = user_states / temperature
    log_normalizer = jax.nn.logsumexp(scaled @ item_vectors.T, axis=-1)
    target_logits = jnp.sum(scaled * item_vectors[targets], axis=-1)
    # The mean logit over the catalog is the logit of the mean item: no pass over B×N.
    mean_logits = scaled @ jnp.mean(item_vectors, axis=0)
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits


def in_batch_cross_entropy(
    user_states: Float[Array, "B D"],
    target_vectors: Float[Array, "B D"],
    targets: Int[Array, " B"],
    valid: Bool[Array, " B"],
    temperature: Float[Array, ""] | float,
    log_q: Float[Array, " B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """Cross-entropy of each target against the other targets of the batch.

    Args:
      valid: whether a row is real; padding is never a negative.
      log_q: log probability that an item is drawn into the batch. Subtracted from the item's logit, it corrects for the
        excess of popular items among the negatives (Yi et al., RecSys 2019, Eq. 3). None leaves the logits as they are.
      label_smoothing: ε, spread evenly over the row's candidates.
    """
    logits = (user_states / temperature) @ target_vectors.T
    if log_q is not None:
        logits = logits - log_q[None, :]
    diagonal = jnp.eye(len(targets), dtype=bool)
    # Another row may have the same target; as a negative it would be pushed away while it is pulled near.
    candidates = diagonal | ((targets[:, None] != targets[None, :]) & valid[None, :])
    logits = jnp.where(candidates, logits, MASKED)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.diagonal(logits)
    mean_logits = jnp.sum(jnp.where(candidates, logits, 0.0), axis=-1) / jnp.sum(candidates, axis=-1)
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits
