"""User pooling: turns the hidden states of a prefix into the user's state.

A pooling computes the state after position t from positions 0..t of the segment. It does this for every t at once, so
that all positions of a packed row train together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.ops.attention import causal_segment_mask


class LastToken(nnx.Module):
    """The hidden state of the last position, where a causal backbone has read the whole prefix."""

    def __call__(self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return hidden


class Mean(nnx.Module):
    """The mean of the prefix's hidden states."""

    def __call__(self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        mask = causal_segment_mask(segment_ids).astype(jnp.float32)
        weights = mask / jnp.sum(mask, axis=-1, keepdims=True)
        return jnp.einsum("bts,bsd->btd", weights, hidden.astype(jnp.float32))


class LearnedAttention(nnx.Module):
    """The prefix's hidden states weighted by a softmax over learned scores, one per position."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.score = nnx.Linear(width, 1, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        hidden = hidden.astype(jnp.float32)
        scores = self.score(hidden)[:, None, :, 0]
        weights = jax.nn.softmax(scores, axis=-1, where=causal_segment_mask(segment_ids))
        return jnp.einsum("bts,bsd->btd", weights, hidden)


POOLINGS = ("last", "mean", "attention")


def create(name: str, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """The pooling called `name`, one of POOLINGS."""
    match name:
        case "last":
            return LastToken()
        case "mean":
            return Mean()
        case "attention":
            return LearnedAttention(width, rngs)
    raise ValueError(f"no user pooling {name!r}")
