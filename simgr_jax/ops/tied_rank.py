"""The rank of an item that ties with others: the mean of the ranks that they share, so that ties flatter no model."""

from __future__ import annotations

from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Number = TypeVar("Number")


def tied_rank(num_better: Number, num_tied: Number) -> Number:
    """The mean of the ranks num_better + 1, ..., num_better + 1 + num_tied.

    Args:
      num_better: how many items are better.
      num_tied: how many other items are equally good.
    """
    return 1 + num_better + num_tied / 2


def num_ahead(
    scores: Float[Array, "B N"], target_scores: Float[Array, "B 1"], counted: Bool[Array, "#B N"] | bool
) -> Float[Array, " B"]:
    """num_better + num_tied / 2 among the `counted` scores. A target that is itself counted ties with itself.

    One select and one sum, because XLA's CPU code for a sum of two comparisons is several times slower.
    """
    ahead = jnp.where(scores > target_scores, 1.0, jnp.where(scores == target_scores, 0.5, 0.0))
    return jnp.sum(ahead, axis=1, dtype=jnp.float32, where=counted)
