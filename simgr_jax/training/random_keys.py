"""The random keys of a training step, for dropout and negatives."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Int


def step_rngs(seed: int, step: Int[Array, ""]) -> nnx.Rngs:
    """The streams "dropout" and "negatives", which share no random bits.

    They depend only on the seed and the step number, so a resumed run draws the same as an uninterrupted one.
    """
    # A key is either split or drawn from, never both, so each stream has its own key.
    dropout, negatives = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return nnx.Rngs(dropout=dropout, negatives=negatives)
