"""From sequences to batches, with Grain: shuffled by seed, packed, prefetched."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset, ThreadPrefetchIterDataset

from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.data.dataset import EvaluationCases, Sequences


class TrainingWindows:
    """Random access to (items, targets) windows of at most `max_items` positions, for Grain.

    A sequence longer than that is cut into windows counted from its newest end, so every interaction trains once an
    epoch and only the oldest window is short.
    """

    def __init__(self, sequences: Sequences, max_items: int):
        self._values = sequences.values
        # A window [begin, end) has the inputs values[begin:end] and the targets values[begin + 1:end + 1].
        begins, ends = [], []
        for start, stop in zip(sequences.offsets[:-1], sequences.offsets[1:] - 1, strict=True):
            for end in range(stop, start, -max_items):
                begins.append(max(start, end - max_items))
                ends.append(end)
        self._begins, self._ends = np.array(begins, np.int64), np.array(ends, np.int64)

    @property
    def num_targets(self) -> int:
        return int((self._ends - self._begins).sum())

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin, end = self._begins[index], self._ends[index]
        return {"items": self._values[begin:end], "targets": self._values[begin + 1 : end + 1]}


def train_batches(
    windows: TrainingWindows, rows: int, row_length: int, seed: int, max_sequences_per_row: int | None = None
) -> grain.DatasetIterator[TrainBatch]:
    """An endless, checkpointable stream of packed batches, reshuffled each epoch.

    Args:
      rows, row_length: the batch's shape [B, T].
      max_sequences_per_row: 1 with `row_length` = the windows' length is plain padding; None packs as many as fit.
    """
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    # A window costs microseconds to read: Grain's threads would only add overhead, one prefetched batch ahead is
    # enough.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = FirstFitPackIterDataset(
        dataset,
        length_struct={"items": row_length, "targets": row_length},
        num_packing_bins=rows,
        max_sequences_per_bin=max_sequences_per_row,
        seed=seed,
    )
    dataset = dataset.batch(rows, drop_remainder=True).map(_to_train_batch)
    return iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))


def _to_train_batch(packed: dict[str, np.ndarray]) -> TrainBatch:
    return TrainBatch(packed["items"], packed["targets"], packed["items_segment_ids"], packed["items_positions"])


def rank_batches(cases: EvaluationCases, batch_size: int, max_items: int) -> Iterator[tuple[RankBatch, int]]:
    """The cases in order, `batch_size` at a time, each history cut to its newest `max_items`, with the count of real
    rows.

    The last batch is filled up with a history of one item, so that every batch has one shape and nothing recompiles.
    """
    stops = cases.histories.offsets[1:]
    lengths = np.minimum(cases.histories.lengths, max_items)
    for first in range(0, len(cases), batch_size):
        count = min(batch_size, len(cases) - first)
        items = np.zeros((batch_size, max_items), np.int32)
        batch_lengths = np.ones(batch_size, np.int32)
        targets = np.zeros(batch_size, np.int32)
        chosen = slice(first, first + count)
        batch_lengths[:count] = lengths[chosen]
        targets[:count] = cases.targets[chosen]
        columns = np.arange(max_items)
        source = (stops[chosen] - lengths[chosen])[:, None] + columns
        real = columns < lengths[chosen][:, None]
        items[:count][real] = cases.histories.values[source[real]]
        yield RankBatch(items, batch_lengths, targets), count
