"""Cuts training sequences into the windows that are packed into batches."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Int

from simgr_jax.data.dataset import Sequences, gather
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.inputs.newest_items import NewestItems
from simgr_jax.inputs.prompts import Prompt
from simgr_jax.inputs.render_rows import render_rows

# What a model learns from (`models.options.ModelOptions.windows`):
#   "history"      it reads a window's items and predicts the next item after each;
#   "with_target"  it also reads the last target, because it predicts what it reads;
#   "one_target"   it reads a history and predicts the one item after it. Each target has its own window, for a model
#                  whose states see the whole history.
WINDOWS = ("history", "with_target", "one_target")


class TrainingWindows:
    """Windows of sequences, for Grain to shuffle and pack.

    A window has at most `max_items` items, and its prompt at most `row_length` inputs. A sequence is cut from its
    newest end, so every interaction trains once per epoch, and the oldest window is the short one.

    Attributes:
      row_length: T, the length of the rows that windows are packed into.
      max_readouts: R, the most items that a row can hold.
      num_inputs: the inputs of all windows together.

    Raises:
      UserError: an item's prompt is longer than a row.
    """

    def __init__(self, sequences: Sequences, prompt: Prompt, max_items: int, row_length: int, windows: str = "history"):
        """windows: one of WINDOWS."""
        self.row_length = row_length
        self.max_readouts = prompt.most_items(row_length)
        self._values, self._prompt, self._kind = sequences.values, prompt, windows
        reads_target = windows == "with_target"
        newest = NewestItems(sequences.values, prompt, max_items, row_length, spare_items=int(reads_target))
        # A window [begin, end) has the items values[begin:end] and the targets values[begin + 1:end + 1].
        cut = _cut_prefixes if windows == "one_target" else _cut_windows
        self._begins, self._ends = cut(sequences.offsets, newest)
        self._input_ends = self._ends + reads_target
        self._lengths = newest.lengths(self._begins, self._input_ends)
        self.num_inputs = int(self._lengths.sum(dtype=np.int64))
        self._room = np.zeros(row_length, np.int8)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """What Grain packs: the window's number, and room for its inputs. Inputs are rendered later, a batch at a
        time."""
        return {"window": np.array([index]), "room": self._room[: self._lengths[index]]}

    def render(self, packed: dict[str, np.ndarray]) -> TrainBatch:
        """The batch of the windows that were packed."""
        windows = packed["window"][packed["window_segment_ids"] > 0]
        begins, ends = self._begins[windows], self._ends[windows]
        items, item_ends = gather(self._values, begins, self._input_ends[windows])
        segment_ids, positions = packed["room_segment_ids"], packed["room_positions"]
        inputs, places = render_rows(items, item_ends, self._prompt, segment_ids > 0, positions)
        if self._kind == "with_target":
            places = np.delete(places, item_ends - 1)
        elif self._kind == "one_target":
            places, begins = places[item_ends - 1], ends - 1

        rows, columns = np.divmod(places, self.row_length)
        valid = np.arange(self.max_readouts) < np.bincount(rows, minlength=len(inputs))[:, None]
        readouts, last_items, targets = np.zeros((3, *valid.shape), np.int32)
        readouts[valid], last_items[valid] = columns, gather(self._values, begins, ends)[0]
        targets[valid] = gather(self._values, begins + 1, ends + 1)[0]
        return TrainBatch(inputs, segment_ids, positions, readouts, last_items, targets, valid)

    def batch_like(self, rows: int) -> TrainBatch:
        """The shapes and types of a batch with this many rows."""
        inputs = jax.ShapeDtypeStruct((rows, self.row_length), "int32")
        readouts, valid = (jax.ShapeDtypeStruct((rows, self.max_readouts), dtype) for dtype in ("int32", "bool"))
        return TrainBatch(inputs, inputs, inputs, readouts, readouts, readouts, valid)


def _cut_windows(offsets: Int[np.ndarray, " S+1"], newest: NewestItems) -> tuple[np.ndarray, np.ndarray]:
    """The begins and ends of all windows: sequence by sequence, the newest window first."""
    owners, starts, ends = np.arange(len(offsets) - 1), offsets[:-1], offsets[1:] - 1
    rounds = []
    while len(owners) or not rounds:  # Each round takes one window of every sequence that has one left.
        left = ends > starts
        owners, starts, ends = owners[left], starts[left], ends[left]
        begins = newest.begins(starts, ends)
        rounds.append((owners, begins, ends))
        ends = begins
    owners, begins, ends = (np.concatenate(arrays) for arrays in zip(*rounds, strict=True))
    order = np.argsort(owners, kind="stable")
    return begins[order], ends[order]


def _cut_prefixes(offsets: Int[np.ndarray, " S+1"], newest: NewestItems) -> tuple[np.ndarray, np.ndarray]:
    """The begins and ends of one window per target: every item but the first of a sequence, and what came before it."""
    starts, ends = np.repeat(offsets[:-1], np.diff(offsets)), np.arange(offsets[-1])
    starts, ends = starts[ends > starts], ends[ends > starts]
    return newest.begins(starts, ends), ends
