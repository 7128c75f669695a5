from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.batches import TrainingWindows, rank_batches, train_batches
from simgr_jax.data.dataset import EvaluationCases, Sequences

LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=12)


def distinct_items(lengths):
    """Sequences in which no item occurs twice, so that an (item, next item) pair tells the user and the place."""
    return Sequences.from_lengths(np.arange(sum(lengths)), np.array(lengths))


def pairs_of(sequences):
    return {pair for sequence in sequences for pair in pairwise(sequence.tolist())}


def segments(batch):
    """Each packed sequence of a batch: its items, targets and positions."""
    for items, targets, ids, positions in zip(*batch, strict=True):
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            yield items[here], targets[here], positions[here]


def take(windows, batches, seed=0, **options):
    stream = train_batches(windows, seed=seed, **options)
    try:
        return [next(stream) for _ in range(batches)]
    finally:
        stream.close()


@given(lengths=LENGTHS, max_items=st.integers(1, 8))
def test_windows_hold_every_pair_once_and_are_cut_from_the_newest_end(lengths, max_items):
    sequences = distinct_items(lengths)
    windows = TrainingWindows(sequences, max_items)
    seen = Counter()
    for i in range(len(windows)):
        window = windows[i]
        assert 1 <= len(window["items"]) <= max_items
        np.testing.assert_array_equal(window["items"][1:], window["targets"][:-1])
        seen.update(zip(window["items"].tolist(), window["targets"].tolist(), strict=True))
    assert seen == Counter(pairs_of(sequences))
    assert windows.num_targets == len(seen)
    assert len(windows) == sum(-(-(n - 1) // max_items) for n in lengths if n > 1)


def test_only_the_oldest_window_is_short():
    windows = TrainingWindows(distinct_items([3, 12]), 4)
    items = sorted(windows[i]["items"].tolist() for i in range(len(windows)))
    assert items == [[0, 1], [3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]


@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS.filter(lambda lengths: max(lengths) > 1), seed=st.integers(0, 1000), rows=st.integers(1, 4))
def test_packing_keeps_windows_whole_and_shows_each_once_an_epoch(lengths, seed, rows):
    sequences = distinct_items(lengths)
    windows = TrainingWindows(sequences, 6)
    whole = {tuple(windows[i]["items"].tolist()) for i in range(len(windows))}
    batches = take(windows, 4 * len(windows), seed, rows=rows, row_length=10)
    seen = Counter()
    for batch in batches:
        assert all(array.shape == (rows, 10) and array.dtype == np.int32 for array in batch)
        for items, targets, positions in segments(batch):
            np.testing.assert_array_equal(targets, items + 1)
            np.testing.assert_array_equal(positions, np.arange(len(items)))
            assert tuple(items.tolist()) in whole
            seen[tuple(items.tolist())] += 1
    # The stream is a chain of epochs, cut off within one, and a few windows still wait in rows that are being packed.
    assert max(seen.values()) - min(seen[window] for window in whole) <= 2


def test_an_epoch_holds_every_window_exactly_once():
    """As many batches as an epoch packs into, where the windows fill their rows and no row mixes two epochs."""
    windows = TrainingWindows(distinct_items([6] * 24), 5)
    for epoch in np.array_split(take(windows, 12, rows=3, row_length=10), 3):
        seen = Counter(int(items[0]) for batch in epoch for items, _, _ in segments(batch))
        assert seen == Counter(range(0, 24 * 6, 6))


def test_one_sequence_a_row_is_plain_padding():
    windows = TrainingWindows(distinct_items([3, 9, 2, 6, 5]), 6)
    for batch in take(windows, 10, rows=2, row_length=6, max_sequences_per_row=1):
        real = batch.segment_ids > 0
        assert batch.segment_ids.max() == 1
        assert real[:, 0].all()
        assert (np.diff(real.astype(int), axis=1) <= 0).all()
        assert not batch.items[~real].any()


def test_batches_depend_on_the_seed_alone():
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4]), 6)
    first, again, other = (take(windows, 8, seed, rows=2, row_length=10) for seed in (3, 3, 4))
    np.testing.assert_array_equal(np.array(first), np.array(again))
    assert (np.array(first) != np.array(other)).any()


def test_epochs_are_shuffled_anew():
    windows = TrainingWindows(distinct_items([6] * 24), 5)
    first, second = np.array_split([batch.items for batch in take(windows, 8, rows=3, row_length=10)], 2)
    assert (first != second).any()


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_restored_stream_goes_on_with_the_batches_that_were_not_taken(stop):
    """Batches that were prefetched when the state was read belong to the future."""
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4]), 6)
    expected = take(windows, 20, rows=2, row_length=10)
    stream = train_batches(windows, 2, 10, seed=0)
    for _ in range(stop):
        next(stream)
    state = stream.get_state()
    stream.close()

    resumed = train_batches(windows, 2, 10, seed=0)
    resumed.set_state(state)
    np.testing.assert_array_equal(np.array([next(resumed) for _ in range(20 - stop)]), np.array(expected[stop:]))
    resumed.close()


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_size=st.integers(1, 7),
    max_items=st.integers(1, 8),
)
def test_rank_batches_keep_the_newest_items_in_one_shape(lengths, batch_size, max_items):
    histories = distinct_items(lengths)
    cases = EvaluationCases(np.arange(len(lengths)), histories, np.arange(len(lengths)) + 1000)
    row = 0
    for batch, count in rank_batches(cases, batch_size, max_items):
        assert batch.items.shape == (batch_size, max_items)
        assert batch.lengths.shape == batch.targets.shape == (batch_size,)
        assert batch.lengths.min() >= 1
        for i in range(count):
            history = histories[row][-max_items:]
            assert batch.lengths[i] == len(history)
            np.testing.assert_array_equal(batch.items[i], np.pad(history, (0, max_items - len(history))))
            assert batch.targets[i] == 1000 + row
            row += 1
    assert row == len(lengths)
