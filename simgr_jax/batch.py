"""The two kinds of batch: what the input pipeline makes and every model takes."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


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
