"""From sequences to batches, with Grain: shuffled by seed, packed, rendered as prompts, prefetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import FirstFitPackIterDataset, ThreadPrefetchIterDataset
from jaxtyping import Bool, Int

from simgr_jax import distributed
from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.data.prompts import Prompt, gather
from simgr_jax.errors import UserError

# What a model is trained on (`Recommender.windows`):
#   "history"      reads a window's items, and predicts the next one after each of them;
#   "with_target"  as "history", but also reads the last target, because it predicts what it reads;
#   "one_target"   reads a history and predicts the one item that comes next: a window for each target, with all its
#                  history, for a model that can't read a history without seeing all of it.
WINDOWS = ("history", "with_target", "one_target")


class TrainingWindows:
    """Windows of sequences, for Grain to shuffle and pack.

    A window is at most `max_items` items, and its prompt at most `row_length` inputs. Windows are counted from a
    sequence's newest end, so every interaction trains once an epoch and the oldest window is the short one.

    Attributes:
      row_length: T, of the rows that the windows are packed into.
      max_readouts: R, the most items that a row can hold.
      num_inputs: of all windows together.

    Raises:
      UserError: an item's prompt is longer than a row.
    """

    def __init__(self, sequences: Sequences, prompt: Prompt, max_items: int, row_length: int, windows: str = "history"):
        """windows: one of WINDOWS."""
        self.row_length = row_length
        self.max_readouts = prompt.most_items(row_length)
        self._values, self._prompt, self._kind = sequences.values, prompt, windows
        reads_target = windows == "with_target"
        cutter = _Cutter(sequences.values, prompt, max_items, row_length, spare_items=int(reads_target))
        # A window [begin, end) has the items values[begin:end] and the targets values[begin + 1:end + 1].
        cut = _cut_prefixes if windows == "one_target" else _cut_windows
        self._begins, self._ends = cut(sequences.offsets, cutter)
        self._input_ends = self._ends + reads_target
        self._lengths = cutter.lengths(self._begins, self._input_ends)
        self.num_inputs = int(self._lengths.sum(dtype=np.int64))
        self._room = np.zeros(row_length, np.int8)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """What is packed: the window's number, and room for its inputs. Rendering is faster for a batch at once."""
        return {"window": np.array([index]), "room": self._room[: self._lengths[index]]}

    def render(self, packed: dict[str, np.ndarray]) -> TrainBatch:
        """The batch of windows that were packed."""
        windows = packed["window"][packed["window_segment_ids"] > 0]
        begins, ends = self._begins[windows], self._ends[windows]
        items, item_ends = gather(self._values, begins, self._input_ends[windows])
        segment_ids, positions = packed["room_segment_ids"], packed["room_positions"]
        inputs, places = _render(items, item_ends, self._prompt, segment_ids > 0, positions)
        if self._kind == "with_target":
            places = np.delete(places, item_ends - 1)
        elif self._kind == "one_target":
            places, begins = places[item_ends - 1], ends - 1

        rows, columns = np.divmod(places, self.row_length)
        valid = np.arange(self.max_readouts) < np.bincount(rows, minlength=len(inputs))[:, None]
        readouts, targets = np.zeros(valid.shape, np.int32), np.zeros(valid.shape, np.int32)
        readouts[valid], targets[valid] = columns, gather(self._values, begins + 1, ends + 1)[0]
        return TrainBatch(inputs, segment_ids, positions, readouts, targets, valid)

    def batch_like(self, rows: int) -> TrainBatch:
        """The shapes and types of a batch of so many rows."""
        inputs = jax.ShapeDtypeStruct((rows, self.row_length), "int32")
        readouts, valid = (jax.ShapeDtypeStruct((rows, self.max_readouts), dtype) for dtype in ("int32", "bool"))
        return TrainBatch(inputs, inputs, inputs, readouts, readouts, valid)


def train_batches(
    windows: TrainingWindows,
    rows: int,
    seed: int,
    max_sequences_per_row: int | None = None,
    *,
    streams: int = 0,
    part: tuple[int, int] = (0, 1),
) -> TrainBatches:
    """An endless, checkpointable stream of packed batches, reshuffled each epoch.

    A batch is made of S streams, so that it is the same however many processes read it: stream s takes windows
    s, s + S, s + 2 S, ... of each epoch's shuffle, and packs rows s B / S to (s + 1) B / S - 1.

    Args:
      rows: B; the windows know T and R.
      max_sequences_per_row: 1 is plain padding; None packs as many as fit.
      streams: S; 0 is one for each part.
      part: (p, P), to read only the p-th of P equal parts of every batch's rows.

    Raises:
      UserError: S is no multiple of P, or B none of S, or there are fewer windows than streams.
    """
    index, parts = part
    streams = streams or parts
    if streams % parts:
        raise UserError(
            f"config.training.input_streams: {streams} can't be shared out among {parts} processes; give a multiple"
        )
    if rows % streams:
        raise UserError(
            f"config.training.batch_rows: {rows} can't be split into {streams} input streams, one or more for each "
            "process; give a multiple"
        )
    if len(windows) < streams:
        raise UserError(
            f"config.training.input_streams: {streams} streams can't share {len(windows)} training sequences; give "
            "fewer, or use fewer processes"
        )
    mine = range(index * streams // parts, (index + 1) * streams // parts)
    return TrainBatches(
        {stream: _packed(windows, rows, seed, max_sequences_per_row, stream, streams) for stream in mine}, streams
    )


def _packed(
    windows: TrainingWindows, rows: int, seed: int, max_sequences_per_row: int | None, stream: int, streams: int
) -> grain.DatasetIterator[TrainBatch]:
    """One of the streams, rows / streams rows at a time."""
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().slice(slice(stream, None, streams)).repeat()
    # A window costs microseconds to read: Grain's threads would only add overhead, a few batches ahead are enough.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = FirstFitPackIterDataset(
        dataset,
        length_struct={"window": windows.max_readouts, "room": windows.row_length},
        # As many as the whole batch has: the fewer are packed at once, the more room is left in each.
        num_packing_bins=rows,
        max_sequences_per_bin=max_sequences_per_row,
        seed=seed,
    )
    dataset = dataset.batch(rows // streams, drop_remainder=True).map(windows.render)
    return iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))


class TrainBatches:
    """The iterator that `train_batches` gives. It must be closed: every stream is prefetched by a thread."""

    def __init__(self, streams: dict[int, grain.DatasetIterator[TrainBatch]], num_streams: int):
        """streams: those that are read here, by number, of `num_streams` in all."""
        self._streams, self._num_streams = streams, num_streams

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> TrainBatch:
        """The next batch's rows of this part, B / P of them."""
        parts = [next(stream) for stream in self._streams.values()]
        return parts[0] if len(parts) == 1 else TrainBatch(*map(np.concatenate, zip(*parts, strict=True)))

    def get_state(self) -> list[dict[str, Any]]:
        """Where each of all S streams stands, as JSON. All processes must call it, and all get the same."""
        mine = {stream: batches.get_state() for stream, batches in self._streams.items()}
        states = {int(stream): state for part in distributed.all_gather(mine) for stream, state in part.items()}
        return [states[stream] for stream in range(self._num_streams)]

    def set_state(self, states: list[dict[str, Any]]) -> None:
        """Goes on where `get_state` was called, be it by more or fewer processes.

        Raises:
          UserError: the states are those of another number of streams.
        """
        if len(states) != self._num_streams:
            raise UserError(
                f"config.training.input_streams: the run here reads {len(states)} input streams, not "
                f"{self._num_streams}; go on with as many processes as before, or fix their number in a new workdir"
            )
        for stream, batches in self._streams.items():
            batches.set_state(states[stream])

    def close(self) -> None:
        for batches in self._streams.values():
            batches.close()


def rank_batches(
    cases: EvaluationCases, prompt: Prompt, batch_size: int, max_items: int, row_length: int
) -> Iterator[tuple[RankBatch, Int[np.ndarray, " C"]]]:
    """All cases, `batch_size` at a time from the shortest prompt to the longest, histories cut as windows are; with
    which cases they are.

    T is a quarter or half of the longest that a prompt can get where that is enough for all of a batch, else the whole:
    little is computed of padding, and no more than three shapes are compiled. Rows of one input fill up the last batch.

    Raises:
      UserError: an item's prompt is longer than `row_length`.
    """
    histories, longest = cases.histories, min(row_length, prompt.longest(max_items))
    starts, ends = histories.offsets[:-1], histories.offsets[1:]
    cutter = _Cutter(histories.values, prompt, max_items, row_length)
    begins = cutter.begins(starts, ends)
    newest = np.maximum(starts, ends - max_items)
    prompt_lengths = cutter.lengths(begins, ends)
    order = np.argsort(prompt_lengths, kind="stable")
    for chosen in np.split(order, range(batch_size, len(order), batch_size)):
        count, longest_here = len(chosen), prompt_lengths[chosen[-1]]
        width = next(width for width in (-(-longest // 4), -(-longest // 2), longest) if longest_here <= width)
        lengths, targets = np.ones(batch_size, np.int32), np.zeros(batch_size, np.int32)
        lengths[:count], targets[:count] = prompt_lengths[chosen], cases.targets[chosen]

        positions = np.broadcast_to(np.arange(width), (count, width))
        items, item_ends = gather(histories.values, begins[chosen], ends[chosen])
        inputs = np.zeros((batch_size, width), np.int32)
        inputs[:count], _ = _render(items, item_ends, prompt, positions < lengths[:count, None], positions)

        history = np.full((batch_size, max_items), -1, np.int32)
        real = np.arange(max_items) < (ends - newest)[chosen, None]
        history[:count][real], _ = gather(histories.values, newest[chosen], ends[chosen])
        yield RankBatch(inputs, lengths, history, targets), chosen


class _Cutter:
    """Cuts histories from the old end, at item boundaries, to what the model may see of them."""

    def __init__(
        self, items: Int[np.ndarray, " E"], prompt: Prompt, max_items: int, row_length: int, spare_items: int = 0
    ):
        """
        Args:
          items: all histories, one after the other.
          spare_items: so many items more, of whatever length, have room in the row.
        """
        prompt.check_fits(row_length, 1 + spare_items)
        row_length -= spare_items * int(prompt.pieces.lengths.max())
        self._max_items, self._row_length, self._overhead = max_items, row_length, prompt.overhead
        # Inputs of all items before each one.
        self._before = np.zeros(len(items) + 1, np.int64)
        np.cumsum(prompt.pieces.lengths[items], out=self._before[1:])

    def begins(self, starts: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """The first item that is kept of each history `items[start:end]`."""
        fit = np.searchsorted(self._before, self._before[ends] - (self._row_length - self._overhead))
        return np.maximum(np.maximum(starts, ends - self._max_items), fit)

    def lengths(self, begins: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """int32 inputs of the prompt of each history `items[begin:end]`."""
        return (self._before[ends] - self._before[begins] + self._overhead).astype(np.int32)


def _cut_windows(offsets: Int[np.ndarray, " S+1"], cutter: _Cutter) -> tuple[np.ndarray, np.ndarray]:
    """The begins and ends of all windows, sequence by sequence, each from its newest window to its oldest."""
    owners, starts, ends = np.arange(len(offsets) - 1), offsets[:-1], offsets[1:] - 1
    rounds = []
    while len(owners) or not rounds:  # In a round, one window of every sequence that has one left.
        left = ends > starts
        owners, starts, ends = owners[left], starts[left], ends[left]
        begins = cutter.begins(starts, ends)
        rounds.append((owners, begins, ends))
        ends = begins
    owners, begins, ends = (np.concatenate(arrays) for arrays in zip(*rounds, strict=True))
    order = np.argsort(owners, kind="stable")
    return begins[order], ends[order]


def _cut_prefixes(offsets: Int[np.ndarray, " S+1"], cutter: _Cutter) -> tuple[np.ndarray, np.ndarray]:
    """The begins and ends of a window for each item but the first of a sequence, with what came before it."""
    starts, ends = np.repeat(offsets[:-1], np.diff(offsets)), np.arange(offsets[-1])
    starts, ends = starts[ends > starts], ends[ends > starts]
    return cutter.begins(starts, ends), ends


def _render(
    items: Int[np.ndarray, " M"],
    item_ends: Int[np.ndarray, " S"],
    prompt: Prompt,
    room: Bool[np.ndarray, "B T"],
    positions: Int[np.ndarray, "B T"],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " M"]]:
    """Rows of S prompts, and where in them (the flat index) the last input of each item is.

    Args:
      items: all histories one after the other, in the order of their places in the rows.
      item_ends: where each history ends in `items` (the index after).
      room: where there is a prompt.
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
