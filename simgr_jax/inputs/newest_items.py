"""Cuts histories to their newest items: at most `data.max_items` of them, and no more than fit in a row."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from simgr_jax.inputs.prompts import Prompt


class NewestItems:
    """The newest items of histories. A history is cut at its old end, between two items.

    Args:
      items: all histories, one after the other.
      max_items: the most items that are kept.
      row_length: the most inputs that a prompt may have.
      spare_items: leaves room in the row for this many more items, however long.

    Raises:
      UserError: an item's prompt is longer than a row.
    """

    def __init__(
        self, items: Int[np.ndarray, " E"], prompt: Prompt, max_items: int, row_length: int, spare_items: int = 0
    ):
        prompt.check_fits(row_length, 1 + spare_items)
        row_length -= spare_items * int(prompt.pieces.lengths.max())
        self._max_items, self._row_length, self._overhead = max_items, row_length, prompt.overhead
        # The number of inputs of all items before each one.
        self._before = np.zeros(len(items) + 1, np.int64)
        np.cumsum(prompt.pieces.lengths[items], out=self._before[1:])

    def begins(self, starts: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """The index of the first item to keep of each history `items[start:end]`."""
        fit = np.searchsorted(self._before, self._before[ends] - (self._row_length - self._overhead))
        return np.maximum(np.maximum(starts, ends - self._max_items), fit)

    def lengths(self, begins: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """int32, the number of inputs in the prompt of each history `items[begin:end]`."""
        return (self._before[ends] - self._before[begins] + self._overhead).astype(np.int32)
