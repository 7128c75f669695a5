"""The two kinds of batch: what the input pipeline makes and every model takes."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int


class TrainBatch(NamedTuple):
    """Packed sequences: a row holds several users' sequences, one after the other.

    Attributes:
      items: the item at each position.
      targets: the item that came next.
      segment_ids: which of the row's sequences a position belongs to, from 1; 0 is padding.
      positions: position within the sequence, from 0.
    """

    items: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class RankBatch(NamedTuple):
    """Histories to continue, each at the beginning of its row.

    Attributes:
      items: history, oldest first, then padding.
      lengths: number of history items, at least 1.
      targets: the item whose rank is asked for.
    """

    items: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    targets: Int[Array, " B"]
