"""The similarity of an item's text to the texts of a history, as a part of a score that training can't undo."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.ops.similarity_loss import to_similarity_space


class TextSimilarity(nnx.Module):
    """w cos(Σ_a d^a x_a, x_i), with x_a the reading of the item read a items ago, and x_i that of item i.

    Readings (`huggingface.item_reader`) are not trained, and w and d are. So an item that training has hardly seen
    keeps its place beside items with similar texts, while the rest of the score learns what they do not say.

    Attributes:
      weight: w, and `decay_logit`: d is its sigmoid.
    """

    def __init__(self):
        self.weight = nnx.Param(jnp.float32(0.5))
        self.decay_logit = nnx.Param(jnp.float32(0))

    @property
    def decay(self) -> Float[Array, ""]:
        return nnx.sigmoid(self.decay_logit[...])

    def weight_and_decay(self) -> tuple[float, float]:
        return float(self.weight[...]), float(self.decay)

    def of_users(
        self, readings: Float[Array, "N X"], items: Int[Array, "B R"], starts: Bool[Array, "B R"]
    ) -> Float[Array, "B R X"]:
        """What is compared with the readings, after each of the items read one after the other.

        Args:
          starts: whether a history begins with the item.
        """

        def read(total, item):
            items, starts = item
            total = jnp.where(starts[:, None], 0, self.decay * total) + readings[items].astype(jnp.float32)
            return total, total

        start = jnp.zeros((len(items), readings.shape[1]))
        totals = jax.lax.scan(read, start, (items.T, starts.T))[1]
        return self.weight[...] * to_similarity_space(jnp.swapaxes(totals, 0, 1), "cosine")

    def at_end(self, readings: Float[Array, "N X"], history: Int[Array, "B M"]) -> Float[Array, "B X"]:
        """What is compared with the readings after a whole history.

        Args:
          history: oldest first, then -1.
        """
        age = jnp.sum(history >= 0, axis=1, keepdims=True) - 1 - jnp.arange(history.shape[1])
        weights = jnp.where(age >= 0, self.decay ** jnp.maximum(age, 0), 0)

        def add(total, item):
            items, weights = item
            return total + weights[:, None] * readings[jnp.maximum(items, 0)].astype(jnp.float32), None

        start = jnp.zeros((len(history), readings.shape[1]))
        total, _ = jax.lax.scan(add, start, (history.T, weights.T))
        return self.weight[...] * to_similarity_space(total, "cosine")
