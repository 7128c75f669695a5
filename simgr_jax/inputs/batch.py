"""The two kinds of batch that the input pipeline makes and every model takes."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class TrainBatch(NamedTuple):
    """Packed prompts: a row holds the prompts of several users, one after the other.

    Attributes:
      inputs: item indices or token ids (see `inputs.prompts.Prompt`).
      segment_ids: the number of an input's prompt within the row, from 1; 0 is padding.
      positions: position within the prompt, from 0.
      readouts: the places in the row where a user's state is read, at most R.
      last_items: the item that was read last there.
      targets: the item that came next.
      valid: whether a readout is real; the others are padding.
    """

    inputs: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    readouts: Int[Array, "B R"]
    last_items: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    valid: Bool[Array, "B R"]

    @property
    def starts(self) -> Bool[Array, "B R"]:
        """Whether a readout is the first of its prompt."""
        segments = jnp.take_along_axis(self.segment_ids, self.readouts, axis=1)
        return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def at_readouts(self, states: Float[Array, "B T D"]) -> Float[Array, "B R D"]:
        return jnp.take_along_axis(states, self.readouts[..., None], axis=1)


class RankBatch(NamedTuple):
    """Histories to continue, each at the beginning of its row.

    Attributes:
      inputs: the history's prompt, then padding.
      lengths: number of inputs, at least 1; the user's state is read at the last.
      history: all items of the history, then -1; includes items that are too old to be among the inputs.
      targets: the item whose rank is asked for.
    """

    inputs: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    history: Int[Array, "B M"]
    targets: Int[Array, " B"]

    @property
    def last_items(self) -> Int[Array, " B"]:
        """The newest item of each history; item 0 for rows that only fill up a batch."""
        last = jnp.maximum(jnp.sum(self.history >= 0, axis=1) - 1, 0)
        return jnp.maximum(jnp.take_along_axis(self.history, last[:, None], axis=1)[:, 0], 0)

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Like `TrainBatch.positions`, but padding is also numbered."""
        return jnp.broadcast_to(jnp.arange(self.inputs.shape[1]), self.inputs.shape)

    @property
    def segment_ids(self) -> Int[Array, "B T"]:
        """1 for the prompt, 0 for padding."""
        return (self.positions < self.lengths[:, None]).astype(jnp.int32)

    def at_end(self, values: Shaped[Array, "B T *D"]) -> Shaped[Array, " B *D"]:
        """The values at each prompt's last input."""
        last = (self.lengths - 1).reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.take_along_axis(values, last, axis=1)[:, 0]
