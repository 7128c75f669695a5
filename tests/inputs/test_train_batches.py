import contextlib
import itertools
import json
import re
from collections import Counter
from contextlib import closing

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.inputs.prompts import Prompt, item_prompt, token_prompt
from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.inputs.training_windows import TrainingWindows
from tests.inputs.examples import LENGTHS, distinct_items, prompts, windows_in, windows_of


def take(windows, batches, seed=0, **options):
    stream = train_batches(windows, seed=seed, **options)
    try:
        return [next(stream) for _ in range(batches)]
    finally:
        stream.close()


def take_parts(windows, batches, parts, states=None, **options):
    """Whole batches, joined from the parts that as many processes read."""
    streams = [train_batches(windows, seed=0, part=(index, parts), **options) for index in range(parts)]
    try:
        for stream in streams:
            if states is not None:
                stream.set_state(states)
        return [TrainBatch(*map(np.concatenate, zip(*map(next, streams), strict=True))) for _ in range(batches)]
    finally:
        for stream in streams:
            stream.close()


def items_of(batches):
    return np.concatenate([batch.inputs for batch in batches])


@pytest.mark.parametrize("kind", ["with_target", "one_target"])
def test_packed_windows_of_any_kind_keep_their_readouts(kind):
    """Where a row has several windows, a state is read at its item's end, and its target is the next item."""
    prompt = token_prompt(np.arange(3 * 36).reshape(36, 3))
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4]), prompt, 6, 40, kind)
    batches = take(windows, 6, rows=2)
    assert any(batch.segment_ids.max() > 2 for batch in batches)
    for batch in batches:
        rows = np.broadcast_to(np.arange(2)[:, None], batch.readouts.shape)[batch.valid]
        columns, targets = batch.readouts[batch.valid], batch.targets[batch.valid]
        np.testing.assert_array_equal(batch.inputs[rows, columns], 3 * (targets - 1) + 2)
        last = np.diff(batch.segment_ids[rows][:, :], axis=1, append=0)[np.arange(len(rows)), columns] != 0
        if kind == "one_target":
            assert last.all() and len(rows) == sum(row.max() for row in batch.segment_ids)
        else:
            assert not last.any()
            following = batch.inputs[rows[:, None], columns[:, None] + np.arange(1, 4)]
            np.testing.assert_array_equal(following, 3 * targets[:, None] + np.arange(3))


@settings(max_examples=15, deadline=None)
@given(
    lengths=LENGTHS.filter(lambda lengths: max(lengths) > 1),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    prompt=prompts(),
)
def test_packing_keeps_windows_whole_and_shows_each_once_per_epoch(lengths, seed, rows, prompt):
    windows = TrainingWindows(distinct_items(lengths), prompt, 6, 20)
    whole = {window for one in distinct_items(lengths) for window in windows_of(one, prompt, 6, 20)}
    like = windows.batch_like(rows)
    seen = Counter()
    for batch in take(windows, 4 * len(windows), seed, rows=rows):
        assert [(array.shape, array.dtype) for array in batch] == [(array.shape, array.dtype) for array in like]
        seen.update(windows_in(batch, prompt))
    assert set(seen) <= whole
    # The last epoch is cut short, and a few windows wait in rows that are not full yet.
    assert max(seen.values()) - min(seen[window] for window in whole) <= 2


def test_a_row_has_a_readout_for_each_item_even_if_all_are_short():
    """Items 0 and 1 have pieces of 2 inputs, item 2 has 5, so a row of 9 holds at most 4 items."""
    prompt = Prompt(np.array([99], np.int32), Sequences.from_lengths(np.arange(9), np.array([2, 2, 5])))
    windows = TrainingWindows(Sequences.from_lists([[0, 1, 0, 1, 2]]), prompt, 8, 9)
    (batch,) = take(windows, 1, rows=1)
    assert windows.max_readouts == 4
    np.testing.assert_array_equal(batch.inputs, [[99, 0, 1, 2, 3, 0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.readouts, [[2, 4, 6, 8]])
    np.testing.assert_array_equal(batch.targets, [[1, 0, 1, 2]])
    assert batch.valid.all()


def test_an_epoch_holds_every_window_exactly_once():
    """Here windows fill their rows, so that no row mixes two epochs."""
    prompt = item_prompt(24 * 6)
    windows = TrainingWindows(distinct_items([6] * 24), prompt, 5, 10)
    batches = take(windows, 12, rows=3)
    for epoch in (batches[:4], batches[4:8], batches[8:]):
        seen = Counter(window[0] for batch in epoch for window in windows_in(batch, prompt))
        assert seen == Counter(range(0, 24 * 6, 6))


def test_one_sequence_per_row_is_plain_padding():
    windows = TrainingWindows(distinct_items([3, 9, 2, 6, 5]), item_prompt(25), 6, 6)
    for batch in take(windows, 10, rows=2, max_sequences_per_row=1):
        real = batch.segment_ids > 0
        assert batch.segment_ids.max() == 1
        assert real[:, 0].all()
        assert (np.diff(real.astype(int), axis=1) <= 0).all()
        np.testing.assert_array_equal(batch.valid, real)


def test_batches_depend_on_the_seed_alone():
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4]), item_prompt(36), 6, 10)
    first, again, other = (take(windows, 8, seed, rows=2) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (items_of(first) != items_of(other)).any()


def test_epochs_are_shuffled_anew():
    windows = TrainingWindows(distinct_items([6] * 24), item_prompt(24 * 6), 5, 10)
    first, second = np.array_split(items_of(take(windows, 8, rows=3)), 2)
    assert (first != second).any()


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_restored_stream_continues_with_the_next_batch(stop):
    """Batches that were prefetched when the state was read are not lost."""
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4]), item_prompt(36), 6, 10)
    expected = take(windows, 20, rows=2)
    stream = train_batches(windows, 2, seed=0)
    for _ in range(stop):
        next(stream)
    state = stream.get_state()
    stream.close()

    resumed = train_batches(windows, 2, seed=0)
    resumed.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, [next(resumed) for _ in range(20 - stop)], expected[stop:])
    resumed.close()


@pytest.mark.parametrize("parts", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_are_the_same_for_any_number_of_processes(parts):
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    expected = take(windows, 10, rows=8, streams=4)
    assert expected[0].inputs.shape == (8, 10)
    jax.tree.map(np.testing.assert_array_equal, take_parts(windows, 10, parts, rows=8, streams=4), expected)


def test_without_a_number_each_process_has_a_stream():
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    one, two = take(windows, 5, rows=4), take_parts(windows, 5, 2, rows=4)
    jax.tree.map(np.testing.assert_array_equal, two, take(windows, 5, rows=4, streams=2))
    assert (items_of(one) != items_of(two)).any()


def rows_of(batch, stream):
    return TrainBatch(*(array[stream : stream + 1] for array in batch))


def test_streams_share_every_epoch():
    """Two of the 36 windows fill a row, so each of 3 streams has its third of an epoch in 6 batches."""
    prompt = item_prompt(36 * 6)
    windows = TrainingWindows(distinct_items([6] * 36), prompt, 5, 10)
    batches = take(windows, 12, rows=3, streams=3)
    for epoch in (batches[:6], batches[6:]):
        seen = [[window[0] for batch in epoch for window in windows_in(rows_of(batch, s), prompt)] for s in range(3)]
        assert Counter(itertools.chain(*seen)) == Counter(range(0, 36 * 6, 6))
        assert [len(one) for one in seen] == [12, 12, 12]
    assert (items_of(batches[:6]) != items_of(batches[6:])).any()


def test_streams_fill_rows_as_well_as_one_does():
    lengths = np.random.default_rng(0).integers(2, 21, 2000)
    windows = TrainingWindows(distinct_items(lengths), item_prompt(lengths.sum()), 20, 64)
    one, eight = (np.mean(items_of(take(windows, 40, rows=16, streams=streams)) > 0) for streams in (1, 8))
    assert one > 0.9
    assert eight > one - 0.01


@pytest.mark.parametrize("parts", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stream_continues_with_another_number_of_processes(parts):
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    expected = take(windows, 12, rows=8, streams=4)
    stream = train_batches(windows, 8, seed=0, streams=4)
    for _ in range(5):
        next(stream)
    states = json.loads(json.dumps(stream.get_state()))
    stream.close()
    jax.tree.map(np.testing.assert_array_equal, take_parts(windows, 7, parts, states, rows=8, streams=4), expected[5:])


def test_the_state_is_that_of_all_processes(monkeypatch):
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    whole = train_batches(windows, 8, seed=0, streams=4)
    halves = [train_batches(windows, 8, seed=0, streams=4, part=(index, 2)) for index in range(2)]
    with closing(whole), closing(halves[0]), closing(halves[1]):
        for _ in range(3):
            for stream in (whole, *halves):
                next(stream)
        shared = []
        monkeypatch.setattr(distributed, "all_gather", lambda mine: shared.append(mine) or shared)
        with contextlib.suppress(KeyError):  # The second half has not shared its state yet.
            halves[0].get_state()
        states = halves[1].get_state()
        monkeypatch.undo()
        assert states == whole.get_state()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rows": 8, "streams": 3, "part": (0, 2)},
            "config.training.input_streams: 3 can't be shared out among 2 processes; give a multiple",
        ),
        ({"rows": 6, "streams": 4}, "config.training.batch_rows: 6 can't be split into 4 input streams"),
        ({"rows": 3, "part": (1, 2)}, "config.training.batch_rows: 3 can't be split into 2 input streams"),
        (
            {"rows": 16, "streams": 16},
            "config.training.input_streams: 16 streams can't share 9 training sequences; give fewer",
        ),
    ],
)
def test_an_impossible_number_of_streams_is_refused(options, message):
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    assert len(windows) == 9
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        train_batches(windows, seed=0, **options)


def test_a_state_of_another_number_of_streams_is_refused():
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    with closing(train_batches(windows, 8, seed=0, streams=4)) as stream:
        states = stream.get_state()
    message = r"^config\.training\.input_streams: the run here reads 4 input streams, not 2; continue with as many"
    with closing(train_batches(windows, 8, seed=0, streams=2)) as stream, pytest.raises(UserError, match=message):
        stream.set_state(states)
