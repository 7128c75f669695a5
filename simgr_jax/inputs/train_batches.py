"""Turns training windows into batches, with Grain: shuffled by seed, packed, rendered, prefetched."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset, ThreadPrefetchIterDataset

from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.inputs.training_windows import TrainingWindows


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

    A batch is made of S streams, so that it does not depend on the number of processes that read it. Stream s takes
    windows s, s + S, s + 2 S, ... of each epoch's shuffle, and packs rows s B / S to (s + 1) B / S - 1.

    Args:
      rows: B, the rows of a batch; T and R are the windows'.
      max_sequences_per_row: 1 is plain padding; None packs as many as fit.
      streams: S; 0 is one per part.
      part: (p, P), reads only the p-th of P equal parts of every batch's rows.

    Raises:
      UserError: S is not a multiple of P, B is not a multiple of S, or there are fewer windows than streams.
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
    """One stream, rows / streams rows at a time."""
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().slice(slice(stream, None, streams)).repeat()
    # Reading a window takes microseconds: Grain's threads would only add overhead, and a few batches ahead suffice.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = FirstFitPackIterDataset(
        dataset,
        length_struct={"window": windows.max_readouts, "room": windows.row_length},
        # As many bins as the whole batch has rows: packing fewer at once would leave more room empty.
        num_packing_bins=rows,
        max_sequences_per_bin=max_sequences_per_row,
        seed=seed,
    )
    dataset = dataset.batch(rows // streams, drop_remainder=True).map(windows.render)
    return iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))


class TrainBatches:
    """The iterator of `train_batches`. It must be closed, because a thread prefetches every stream."""

    def __init__(self, streams: dict[int, grain.DatasetIterator[TrainBatch]], num_streams: int):
        """streams: the streams read in this process, by number, among `num_streams` in all."""
        self._streams, self._num_streams = streams, num_streams

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> TrainBatch:
        """This part's B / P rows of the next batch."""
        parts = [next(stream) for stream in self._streams.values()]
        return parts[0] if len(parts) == 1 else TrainBatch(*map(np.concatenate, zip(*parts, strict=True)))

    def get_state(self) -> list[dict[str, Any]]:
        """The position of each of the S streams, as JSON. All processes must call it, and all get the same result."""
        mine = {stream: batches.get_state() for stream, batches in self._streams.items()}
        states = {int(stream): state for part in distributed.all_gather(mine) for stream, state in part.items()}
        return [states[stream] for stream in range(self._num_streams)]

    def set_state(self, states: list[dict[str, Any]]) -> None:
        """Continues from where `get_state` was called, possibly by more or fewer processes.

        Raises:
          UserError: the states are of another number of streams.
        """
        if len(states) != self._num_streams:
            raise UserError(
                f"config.training.input_streams: the run here reads {len(states)} input streams, not "
                f"{self._num_streams}; continue with as many processes as before, or fix their number in a new workdir"
            )
        for stream, batches in self._streams.items():
            batches.set_state(states[stream])

    def close(self) -> None:
        for batches in self._streams.values():
            batches.close()
