"""The random keys of a training step: where dropout and negatives are drawn from."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Int


def step_rngs(seed: int, step: Int[Array, ""]) -> nnx.Rngs:
    """The streams "dropout" and "negatives", which share no random bits.

    They depend on the seed and the step number alone, so a resumed run draws what an unbroken one would.
    """
    # A key is either split or drawn from, never both: each stream has a key of its own.
    dropout, negatives = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return nnx.Rngs(dropout=dropout, negatives=negatives)
