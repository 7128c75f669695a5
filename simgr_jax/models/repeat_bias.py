"""A learned number that is added to the scores of items that a history has."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.ops.top_k import in_history

SPEED = 10.0


class RepeatBias(nnx.Module):
    """b is added to the score of every item in the history.

    What is most similar to a history is the history itself. In most shops few items are bought twice, and then b
    becomes negative; where people buy the same again, it becomes positive. Without it the item vectors have to learn
    this, and unlearn similarity (a simple form of RepeatNet's two modes, https://arxiv.org/abs/1812.02646).

    Attributes:
      scaled: b / SPEED, so that b crosses its range in some dozens of an optimizer's steps.
    """

    def __init__(self):
        # Most shops are of the first kind.
        self.scaled = nnx.Param(jnp.float32(-1 / SPEED))

    @property
    def bias(self) -> Float[Array, ""]:
        return SPEED * self.scaled[...]

    def in_ranking(self, scores: Float[Array, "B N"], history: Int[Array, "B M"]) -> Float[Array, "B N"]:
        """The scores with the bias; see `ops.top_k.in_history`."""
        return scores + self.bias * in_history(scores, history)

    def in_cross_entropy(
        self,
        losses: Float[Array, " B*R"],
        batch: TrainBatch,
        states: Float[Array, "B*R E"],
        target_vectors: Float[Array, "B*R E"],
        read_vectors: Float[Array, "B*R E"],
        temperature: Float[Array, ""],
    ) -> Float[Array, " B*R"]:
        """Full-catalog losses with the bias, from those without it. Only the history's logits change, so nothing is
        computed of other items.

        Args:
          losses: -log p(target) without the bias, at the batch's readouts.
          states: the users'; their dot products with items' vectors, divided by the temperature, are the logits.
          target_vectors, read_vectors: of the targets, and of the items that were read last.
        """
        bias = self.bias / temperature
        by_row = lambda of_readouts: of_readouts.reshape(*batch.targets.shape, -1)  # noqa: E731
        # [b, r, a] is about the item read at a, as seen from r.
        is_in_history = newest_in_history(batch.last_items, batch.starts)
        is_target = batch.targets[:, :, None] == batch.last_items[:, None, :]
        logits_of_read = jnp.einsum("bre,bae->bra", by_row(states), by_row(read_vectors)) / temperature
        log_normalizers = by_row(losses + jnp.sum(states * target_vectors, axis=-1) / temperature)
        # exp of what other readouts have read may overflow, and 0 times its gradient is NaN.
        logits_of_read = jnp.where(is_in_history, logits_of_read, log_normalizers)
        share = jnp.sum(jnp.exp(logits_of_read - log_normalizers), axis=-1, where=is_in_history)
        # A history can have all of the probability as far as float32 can tell.
        change = jnp.log1p(jnp.maximum(jnp.expm1(bias) * share, -1 + 1e-6))
        return losses + (change - bias * jnp.any(is_in_history & is_target, axis=-1)).reshape(-1)


def newest_in_history(items: Int[Array, "B R"], starts: Bool[Array, "B R"]) -> Bool[Array, "B R R"]:
    """[b, r, a], whether a is in the history of r and is the newest there of its item, so that no item counts twice.

    Args:
      items: read one after the other.
      starts: whether a history begins with the item.
    """
    number, place = jnp.cumsum(starts, axis=1), jnp.arange(items.shape[1])
    same_history = number[:, :, None] == number[:, None, :]
    is_later = place[None, :] > place[:, None]
    # Where the same item is read again next, [b, a].
    again = same_history & is_later & (items[:, :, None] == items[:, None, :])
    next_place = jnp.where(jnp.any(again, axis=-1), jnp.argmax(again, axis=-1), items.shape[1])
    return same_history & ~is_later & (next_place[:, None, :] > place[:, None])
