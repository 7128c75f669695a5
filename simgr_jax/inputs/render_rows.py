"""Puts the prompts of histories into rows of a batch."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from simgr_jax.inputs.prompts import Prompt


def render_rows(
    items: Int[np.ndarray, " M"],
    item_ends: Int[np.ndarray, " S"],
    prompt: Prompt,
    room: Bool[np.ndarray, "B T"],
    positions: Int[np.ndarray, "B T"],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " M"]]:
    """The inputs of rows that hold S prompts, and the flat index in them of each item's last input.

    Args:
      items: all histories, one after the other, in the order of their places in the rows.
      item_ends: where each history ends in `items` (the index after).
      room: the places that hold a prompt's input.
      positions: within the prompt.
    """
    is_first = np.zeros(len(items), bool)
    is_first[np.concatenate([[0], item_ends[:-1]])] = True
    pieces, ends = prompt.render(items, is_first)
    inputs, size = np.zeros(room.shape, np.int32), len(prompt.prefix)
    in_prefix = room & (positions < size)
    inputs[in_prefix] = prompt.prefix[positions[in_prefix]]
    after_prefix = np.flatnonzero(room & (positions >= size))
    inputs.reshape(-1)[after_prefix] = pieces
    return inputs, after_prefix[ends - 1]
