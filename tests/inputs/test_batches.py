import contextlib
import itertools
import json
import math
import re
from collections import Counter
from contextlib import closing

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs import batches as batches_module
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.inputs.batches import TrainingWindows, rank_batches, train_batches
from simgr_jax.inputs.prompts import Prompt, item_prompt, token_prompt

LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=12)
ITEMS = 23 * 12


def distinct_items(lengths):
    """Sequences in which no item occurs twice, so that an item tells the user and the place."""
    return Sequences.from_lengths(np.arange(sum(lengths)), np.array(lengths))


@st.composite
def prompts(draw):
    """Pieces of 1 to 5 inputs that tell the item, a prefix of up to 3, and perhaps merged inputs."""
    prefix, merged = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    sizes = np.random.default_rng(draw(st.integers(0, 100))).integers(1 + merged, 6, ITEMS)
    values = np.concatenate([10 * item + np.arange(size) for item, size in enumerate(sizes)])
    return Prompt(np.arange(prefix, dtype=np.int32) + 10 * ITEMS, Sequences.from_lengths(values, sizes), merged)


def rendered(prompt, items):
    """The prompt's inputs, and the place of each item's last one."""
    inputs, places = prompt.prefix.tolist(), []
    for index, item in enumerate(items):
        inputs += prompt.pieces[item].tolist()[prompt.merged if index == 0 else 0 :]
        places.append(len(inputs) - 1)
    return inputs, places


def newest(prompt, items, max_items, row_length):
    """As many of the newest items as are allowed."""
    kept = len(items)
    while kept > max_items or len(rendered(prompt, items[len(items) - kept :])[0]) > row_length:
        kept -= 1
    return items[len(items) - kept :]


def windows_of(sequence, prompt, max_items, row_length):
    """A sequence's windows, each as its items and the item after them."""
    left = sequence.tolist()
    while len(left) > 1:
        window = newest(prompt, left[:-1], max_items, row_length)
        yield (*window, left[-1])
        left = left[: len(left) - len(window)]


def prompts_in(batch, prompt):
    """Each packed window of a batch, as its items and the item after them; all else about it is checked."""
    for inputs, ids, positions, readouts, targets, valid in zip(*batch, strict=True):
        assert (np.diff(valid.astype(int)) <= 0).all()
        assert (np.diff(readouts[valid]) > 0).all()
        for segment in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            here = valid & np.isin(readouts, places)
            window = (targets[here][0] - 1, *targets[here].tolist())  # Items follow one another in `distinct_items`.
            expected, ends = rendered(prompt, window[:-1])
            assert inputs[places].tolist() == expected
            assert (readouts[here] - places[0]).tolist() == ends
            yield window
        assert not inputs[ids == 0].any()
        assert set(readouts[valid]) <= set(np.flatnonzero(ids))


def take(windows, batches, seed=0, **options):
    stream = train_batches(windows, seed=seed, **options)
    try:
        return [next(stream) for _ in range(batches)]
    finally:
        stream.close()


def take_parts(windows, batches, parts, states=None, **options):
    """Global batches, put together from what each of so many processes reads."""
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


def alone(windows, index):
    """A window as the only one of a batch."""
    length = len(windows[index]["room"])
    room = np.arange(windows.row_length) < length
    packed = {"window": np.array([[index]]), "window_segment_ids": np.ones((1, 1), np.int32)}
    packed |= {"room_segment_ids": np.int32(room)[None], "room_positions": np.int32(np.arange(len(room)) * room)[None]}
    return windows.render(packed)


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_are_cut_from_the_newest_end_to_what_fits(lengths, max_items, prompt, extra):
    """Sequence by sequence, none lost: every item but a sequence's first is a target once an epoch."""
    sequences, row_length = distinct_items(lengths), prompt.longest(1) + extra
    windows = TrainingWindows(sequences, prompt, max_items, row_length)
    seen = [window for i in range(len(windows)) for window in prompts_in(alone(windows, i), prompt)]
    assert seen == [window for one in sequences for window in windows_of(one, prompt, max_items, row_length)]
    assert Counter(item for window in seen for item in window[1:]) == Counter(
        item for one in sequences for item in one[1:].tolist()
    )
    assert windows.num_inputs == sum(len(rendered(prompt, window[:-1])[0]) for window in seen)


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_with_target_read_one_item_more_than_they_have_states_to_read(lengths, max_items, prompt, extra):
    """What is read after a history of the window is its target: for models that predict their inputs."""
    sequences, row_length = distinct_items(lengths), prompt.longest(2) + extra
    windows = TrainingWindows(sequences, prompt, max_items, row_length, "with_target")
    targets = Counter()
    for i in range(len(windows)):
        batch = alone(windows, i)
        valid, length = batch.valid[0], len(windows[i]["room"])
        following = batch.targets[0][valid]
        window = [following[0] - 1, *following]
        assert len(window) <= max_items + 1
        expected, ends = rendered(prompt, window)
        assert batch.inputs[0, :length].tolist() == expected
        assert batch.readouts[0][valid].tolist() == ends[:-1]
        targets.update(following.tolist())
    assert targets == Counter(item for one in sequences for item in one[1:].tolist())


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_of_one_target_read_all_that_came_before_it(lengths, max_items, prompt, extra):
    sequences, row_length = distinct_items(lengths), prompt.longest(1) + extra
    windows = TrainingWindows(sequences, prompt, max_items, row_length, "one_target")
    batches = [alone(windows, i) for i in range(len(windows))]
    cases = [(one[:end].tolist(), one[end]) for one in sequences for end in range(1, len(one))]
    for batch, (history, target) in zip(batches, cases, strict=True):
        expected, ends = rendered(prompt, newest(prompt, history, max_items, row_length))
        assert batch.inputs[0, : len(expected)].tolist() == expected
        assert (batch.segment_ids[0] > 0).sum() == len(expected)
        assert batch.valid[0].tolist() == [True] + [False] * (windows.max_readouts - 1)
        assert (batch.readouts[0, 0], batch.targets[0, 0]) == (ends[-1], target)


@pytest.mark.parametrize("kind", ["with_target", "one_target"])
def test_packed_windows_of_any_kind_keep_their_readouts(kind):
    """In rows of several windows, each state is read where its item ends, and its target is the item after that one."""
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


def test_only_the_oldest_window_is_short():
    windows = TrainingWindows(distinct_items([3, 12]), item_prompt(15), 4, 6)
    items = sorted(alone(windows, i).inputs[0, : len(windows[i]["room"])].tolist() for i in range(len(windows)))
    assert items == [[0, 1], [3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]


def test_no_sequences_have_no_windows():
    for lengths in ([], [0], [1, 1]):
        assert len(TrainingWindows(distinct_items(lengths), item_prompt(2), 4, 6)) == 0


@settings(max_examples=15, deadline=None)
@given(
    lengths=LENGTHS.filter(lambda lengths: max(lengths) > 1),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    prompt=prompts(),
)
def test_packing_keeps_windows_whole_and_shows_each_once_an_epoch(lengths, seed, rows, prompt):
    windows = TrainingWindows(distinct_items(lengths), prompt, 6, 20)
    whole = {window for one in distinct_items(lengths) for window in windows_of(one, prompt, 6, 20)}
    like = windows.batch_like(rows)
    seen = Counter()
    for batch in take(windows, 4 * len(windows), seed, rows=rows):
        assert [(array.shape, array.dtype) for array in batch] == [(array.shape, array.dtype) for array in like]
        seen.update(prompts_in(batch, prompt))
    assert set(seen) <= whole
    # The stream is a chain of epochs, cut off within one, and a few windows still wait in rows that are being packed.
    assert max(seen.values()) - min(seen[window] for window in whole) <= 2


def test_a_row_of_the_shortest_pieces_has_a_readout_for_each():
    """Items 0 and 1 have pieces of 2 inputs, item 2 has 5: no row can hold more readouts than 9 // 2."""
    prompt = Prompt(np.array([99], np.int32), Sequences.from_lengths(np.arange(9), np.array([2, 2, 5])))
    windows = TrainingWindows(Sequences.from_lists([[0, 1, 0, 1, 2]]), prompt, 8, 9)
    (batch,) = take(windows, 1, rows=1)
    assert windows.max_readouts == 4
    np.testing.assert_array_equal(batch.inputs, [[99, 0, 1, 2, 3, 0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.readouts, [[2, 4, 6, 8]])
    np.testing.assert_array_equal(batch.targets, [[1, 0, 1, 2]])
    assert batch.valid.all()


def test_an_epoch_holds_every_window_exactly_once():
    """As many batches as an epoch packs into, where the windows fill their rows and no row mixes two epochs."""
    prompt = item_prompt(24 * 6)
    windows = TrainingWindows(distinct_items([6] * 24), prompt, 5, 10)
    batches = take(windows, 12, rows=3)
    for epoch in (batches[:4], batches[4:8], batches[8:]):
        seen = Counter(window[0] for batch in epoch for window in prompts_in(batch, prompt))
        assert seen == Counter(range(0, 24 * 6, 6))


def test_one_sequence_a_row_is_plain_padding():
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
def test_a_restored_stream_goes_on_with_the_batches_that_were_not_taken(stop):
    """Batches that were prefetched when the state was read belong to the future."""
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


@pytest.mark.parametrize("parts", [1, 2, 4])
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


def test_streams_share_every_epoch():
    """36 windows in 3 streams, two of which fill a row: each stream has its third of an epoch in 6 batches."""
    prompt = item_prompt(36 * 6)
    windows = TrainingWindows(distinct_items([6] * 36), prompt, 5, 10)
    batches = take(windows, 12, rows=3, streams=3)
    for epoch in (batches[:6], batches[6:]):
        seen = [[window[0] for batch in epoch for window in prompts_in(rows_of(batch, s), prompt)] for s in range(3)]
        assert Counter(itertools.chain(*seen)) == Counter(range(0, 36 * 6, 6))
        assert [len(one) for one in seen] == [12, 12, 12]
    assert (items_of(batches[:6]) != items_of(batches[6:])).any()


def rows_of(batch, stream):
    return TrainBatch(*(array[stream : stream + 1] for array in batch))


def test_streams_fill_rows_as_well_as_one_does():
    lengths = np.random.default_rng(0).integers(2, 21, 2000)
    windows = TrainingWindows(distinct_items(lengths), item_prompt(lengths.sum()), 20, 64)
    one, eight = (np.mean(items_of(take(windows, 40, rows=16, streams=streams)) > 0) for streams in (1, 8))
    assert one > 0.9
    assert eight > one - 0.01


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_stream_goes_on_with_another_number_of_processes(parts):
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
        monkeypatch.setattr(batches_module.distributed, "all_gather", lambda mine: shared.append(mine) or shared)
        with contextlib.suppress(KeyError):  # The second half's is not there yet.
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
def test_streams_that_can_not_be(options, message):
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    assert len(windows) == 9
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        train_batches(windows, seed=0, **options)


def test_a_state_of_another_number_of_streams_is_refused():
    windows = TrainingWindows(distinct_items([5, 7, 3, 8, 9, 4, 6]), item_prompt(42), 6, 10)
    with closing(train_batches(windows, 8, seed=0, streams=4)) as stream:
        states = stream.get_state()
    message = r"^config\.training\.input_streams: the run here reads 4 input streams, not 2; go on with as many"
    with closing(train_batches(windows, 8, seed=0, streams=2)) as stream, pytest.raises(UserError, match=message):
        stream.set_state(states)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_size=st.integers(1, 7),
    max_items=st.integers(1, 8),
    prompt=prompts(),
    extra=st.integers(0, 20),
)
def test_rank_batches_keep_the_newest_items(lengths, batch_size, max_items, prompt, extra):
    histories, row_length = distinct_items(lengths), prompt.longest(1) + extra
    cases = EvaluationCases(np.arange(len(lengths)), histories, np.arange(len(lengths)) + 1000)
    longest = min(row_length, len(prompt.prefix) - prompt.merged + max_items * prompt.pieces.lengths.max())
    seen, before = [], 0
    for batch, chosen in rank_batches(cases, prompt, batch_size, max_items, row_length):
        width, count = batch.inputs.shape[1], len(chosen)
        assert batch.inputs.shape == (batch_size, width)
        assert batch.history.shape == (batch_size, max_items)
        assert batch.lengths.shape == batch.targets.shape == (batch_size,)
        assert all(array.dtype == np.int32 for array in batch)
        assert batch.lengths.min() >= 1
        assert (batch.history[count:] == -1).all()
        for i, case in enumerate(chosen):
            items = histories[case].tolist()
            inputs, _ = rendered(prompt, newest(prompt, items, max_items, row_length))
            assert batch.lengths[i] == len(inputs) >= before
            assert batch.inputs[i].tolist() == inputs + [0] * (width - len(inputs))
            # What is filtered out does not depend on how long the prompts are.
            assert batch.history[i].tolist() == items[-max_items:] + [-1] * (max_items - len(items))
            assert batch.targets[i] == 1000 + case
            before = len(inputs)
        assert width == min(w for w in (math.ceil(longest / 4), math.ceil(longest / 2), longest) if w >= before)
        seen.extend(chosen)
    assert sorted(seen) == list(range(len(lengths)))


def test_an_item_that_no_row_can_hold_is_refused():
    prompt = token_prompt(np.arange(12).reshape(3, 4))
    sequences = Sequences.from_lists([[0, 1, 2]])
    message = r"^config\.training\.row_length: 3 is too short for the item with the longest prompt, 4 tokens; give"
    with pytest.raises(UserError, match=message):
        TrainingWindows(sequences, prompt, 5, 3)
    with pytest.raises(UserError, match=message):
        next(rank_batches(EvaluationCases(np.zeros(1), sequences, np.zeros(1)), prompt, 2, 5, 3))
    assert len(TrainingWindows(sequences, prompt, 5, 4)) == 2
    with pytest.raises(UserError, match=r"^config\.training\.row_length: 7 is too short for 2 items, 8 tokens; give"):
        TrainingWindows(sequences, prompt, 5, 7, "with_target")
