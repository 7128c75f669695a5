"""The two kinds of batch: what the input pipeline makes and every model takes."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class TrainBatch(NamedTuple):
    """Packed prompts: a row holds those of several users, one after the other.

    Attributes:
      inputs: what the backbone reads, item indices or token ids (see `data.prompts.Prompt`).
      segment_ids: which of the row's prompts an input belongs to, from 1; 0 is padding.
      positions: position within the prompt, from 0.
      readouts: where in the row a user's state is read, R of them at most.
      targets: the item that came next.
      valid: whether a readout is one; the others are padding.
    """

    inputs: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    readouts: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    valid: Bool[Array, "B R"]

    def at_readouts(self, states: Float[Array, "B T D"]) -> Float[Array, "B R D"]:
        return jnp.take_along_axis(states, self.readouts[..., None], axis=1)


class RankBatch(NamedTuple):
    """Histories to continue, each at the beginning of its row.

    Attributes:
      inputs: the history's prompt, then padding.
      lengths: number of inputs, at least 1; the user's state is read at the last.
      history: the history's newest items, M at most, then -1.
      targets: the item whose rank is asked for.
    """

    inputs: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    history: Int[Array, "B M"]
    targets: Int[Array, " B"]

    @property
    def positions(self) -> Int[Array, "B T"]:
        """As `TrainBatch.positions`; of padding, too."""
        return jnp.broadcast_to(jnp.arange(self.inputs.shape[1]), self.inputs.shape)

    @property
    def segment_ids(self) -> Int[Array, "B T"]:
        """1 for the prompt, 0 for padding."""
        return (self.positions < self.lengths[:, None]).astype(jnp.int32)

    def at_end(self, values: Shaped[Array, "B T *D"]) -> Shaped[Array, " B *D"]:
        """What `values` has of each prompt's last input."""
        last = (self.lengths - 1).reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.take_along_axis(values, last, axis=1)[:, 0]
