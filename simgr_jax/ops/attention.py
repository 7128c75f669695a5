"""Attention within packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where position t (second axis) may look at position s (third): s <= t and both in one segment.

    Padding (segment 0) forms a segment of its own, so that no row of the mask is empty and no softmax is NaN.
    """
    positions = jnp.arange(segment_ids.shape[1])
    causal = positions[:, None] >= positions[None, :]
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    query: Float[Array, "B T H head"],
    key: Float[Array, "B T Hkv head"],
    value: Float[Array, "B T Hkv head"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T H head"]:
    """Causal attention that never crosses a segment; scores are scaled by 1/sqrt(head).

    Grouped-query attention (https://arxiv.org/abs/2305.13245): H is a multiple of Hkv.
    """
    mask = causal_segment_mask(segment_ids)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask)
