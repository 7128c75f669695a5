"""The similarity of an item's text to the texts of a history, as a part of the score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.ops.similarity_loss import to_similarity_space


class TextSimilarity(nnx.Module):
    """w cos(h + h W, x_i + x_i V), with h = Σ_a d^a x_a, x_a the reading of the item read a items ago, and x_i that of
    item i.

    Readings (`huggingface.item_reader`) are not trained, and W and V begin at zero. So the score begins as "a text like
    those that were bought last", and learns of all items at once which texts follow which. An item that training has
    hardly seen keeps its place beside items with similar texts. W and V hold more numbers than a small shop has
    interactions; dropout of h keeps them from learning these by heart.

    Attributes:
      weight: w, and `decay_logit`: d is its sigmoid.
      history_map, item_map: W and V, [X, X].
    """

    def __init__(self, width: int, dropout: float):
        """
        Args:
          width: X, that of the readings.
          dropout: rate on h.
        """
        self.weight = nnx.Param(jnp.float32(1))
        self.decay_logit = nnx.Param(jnp.float32(0))
        self.history_map = nnx.Param(jnp.zeros((width, width)), axes=(None, "embed"))
        self.item_map = nnx.Param(jnp.zeros((width, width)), axes=(None, "embed"))
        self.dropout = nnx.Dropout(dropout)

    @property
    def decay(self) -> Float[Array, ""]:
        return nnx.sigmoid(self.decay_logit[...])

    def of_items(self, readings: Float[Array, "*M X"]) -> Float[Array, "*M X"]:
        """What items are compared by: unit vectors, float32."""
        readings = readings.astype(jnp.float32)
        return to_similarity_space(readings + readings @ self.item_map[...], "cosine")

    def of_read(self, readings: Float[Array, "*B X"]) -> Float[Array, "*B X"]:
        """h + h W; of one reading, what the item adds to it when it is read."""
        readings = readings.astype(jnp.float32)
        return readings + readings @ self.history_map[...]

    def of_users(
        self,
        readings: Float[Array, "B R X"],
        starts: Bool[Array, "B R"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B R X"]:
        """What is compared with the items, after each of the items read one after the other.

        Args:
          readings: of these items.
          starts: whether a history begins with the item.
          rngs: with a "dropout" stream in training.
        """

        def read(total, item):
            readings, starts = item
            total = self._read(jnp.where(starts[:, None], 0, total), readings)
            return total, total

        in_order = jnp.swapaxes(readings, 0, 1), starts.T
        totals = jax.lax.scan(read, jnp.zeros_like(readings[:, 0], jnp.float32), in_order)[1]
        totals = jnp.swapaxes(totals, 0, 1)
        return self._compared(self.dropout(totals, deterministic=rngs is None, rngs=rngs))

    def at_end(self, readings: Float[Array, "N X"], history: Int[Array, "B M"]) -> Float[Array, "B X"]:
        """What is compared with the items after a whole history.

        Args:
          history: oldest first, then -1.
        """

        def read(total, items):
            return jnp.where(items[:, None] >= 0, self._read(total, readings[jnp.maximum(items, 0)]), total), None

        nothing = jnp.zeros((len(history), readings.shape[1]))
        return self._compared(jax.lax.scan(read, nothing, history.T)[0])

    def _read(self, total: Float[Array, "B X"], readings: Float[Array, "B X"]) -> Float[Array, "B X"]:
        """h after one more item."""
        return self.decay * total + readings.astype(jnp.float32)

    def _compared(self, totals: Float[Array, "*B X"]) -> Float[Array, "*B X"]:
        return self.weight[...] * to_similarity_space(self.of_read(totals), "cosine")
