from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.prompts import item_prompt, token_prompt
from simgr_jax.inputs.training_windows import WINDOWS, TrainingWindows
from tests.inputs.examples import LENGTHS, distinct_items, newest, prompts, rendered, windows_in, windows_of


def alone(windows, index):
    """A batch of this window alone."""
    length = len(windows[index]["room"])
    room = np.arange(windows.row_length) < length
    packed = {"window": np.array([[index]]), "window_segment_ids": np.ones((1, 1), np.int32)}
    packed |= {"room_segment_ids": np.int32(room)[None], "room_positions": np.int32(np.arange(len(room)) * room)[None]}
    return windows.render(packed)


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_are_cut_from_the_newest_end_as_long_as_fits(lengths, max_items, prompt, extra):
    """No item is lost: each one but the first of a sequence is a target once per epoch."""
    sequences, row_length = distinct_items(lengths), prompt.longest(1) + extra
    windows = TrainingWindows(sequences, prompt, max_items, row_length)
    seen = [window for i in range(len(windows)) for window in windows_in(alone(windows, i), prompt)]
    assert seen == [window for one in sequences for window in windows_of(one, prompt, max_items, row_length)]
    assert Counter(item for window in seen for item in window[1:]) == Counter(
        item for one in sequences for item in one[1:].tolist()
    )
    assert windows.num_inputs == sum(len(rendered(prompt, window[:-1])[0]) for window in seen)


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_with_target_also_read_their_last_target(lengths, max_items, prompt, extra):
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
        assert batch.last_items[0][valid].tolist() == window[:-1]
        targets.update(following.tolist())
    assert targets == Counter(item for one in sequences for item in one[1:].tolist())


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 8), prompt=prompts(), extra=st.integers(0, 20))
def test_windows_of_one_target_read_everything_before_it(lengths, max_items, prompt, extra):
    sequences, row_length = distinct_items(lengths), prompt.longest(1) + extra
    windows = TrainingWindows(sequences, prompt, max_items, row_length, "one_target")
    batches = [alone(windows, i) for i in range(len(windows))]
    cases = [(one[:end].tolist(), one[end]) for one in sequences for end in range(1, len(one))]
    for batch, (history, target) in zip(batches, cases, strict=True):
        expected, ends = rendered(prompt, newest(prompt, history, max_items, row_length))
        assert batch.inputs[0, : len(expected)].tolist() == expected
        assert (batch.segment_ids[0] > 0).sum() == len(expected)
        assert batch.valid[0].tolist() == [True] + [False] * (windows.max_readouts - 1)
        assert (batch.readouts[0, 0], batch.last_items[0, 0], batch.targets[0, 0]) == (ends[-1], history[-1], target)


@settings(deadline=None)
@given(lengths=LENGTHS, max_items=st.integers(1, 25), prompt=prompts(), kind=st.sampled_from(WINDOWS))
def test_rows_without_a_length_hold_the_longest_window_and_cut_none(lengths, max_items, prompt, kind):
    sequences = distinct_items(lengths)
    windows = TrainingWindows(sequences, prompt, max_items, 0, kind)
    whole = TrainingWindows(sequences, prompt, max_items, prompt.longest(max_items + 1), kind)
    room = [[len(one[i]["room"]) for i in range(len(one))] for one in (windows, whole)]
    assert room[0] == room[1]
    assert windows.num_inputs == whole.num_inputs == sum(room[0])
    assert windows.row_length == max(64, *room[0], 0)
    assert windows.max_readouts == prompt.most_items(windows.row_length)
    if room[0]:
        longest = int(np.argmax(room[0]))
        assert (alone(windows, longest).segment_ids[0] > 0).sum() == room[0][longest]


def test_only_the_oldest_window_is_short():
    windows = TrainingWindows(distinct_items([3, 12]), item_prompt(15), 4, 6)
    items = sorted(alone(windows, i).inputs[0, : len(windows[i]["room"])].tolist() for i in range(len(windows)))
    assert items == [[0, 1], [3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]


def test_sequences_of_fewer_than_two_items_have_no_windows():
    for lengths in ([], [0], [1, 1]):
        assert len(TrainingWindows(distinct_items(lengths), item_prompt(2), 4, 6)) == 0


def test_an_item_that_no_row_can_hold_is_refused():
    prompt = token_prompt(np.arange(12).reshape(3, 4))
    sequences = Sequences.from_lists([[0, 1, 2]])
    message = r"^config\.training\.row_length: 3 is too short for the item with the longest prompt, 4 tokens; give"
    with pytest.raises(UserError, match=message):
        TrainingWindows(sequences, prompt, 5, 3)
    assert len(TrainingWindows(sequences, prompt, 5, 4)) == 2
    with pytest.raises(UserError, match=r"^config\.training\.row_length: 7 is too short for 2 items, 8 tokens; give"):
        TrainingWindows(sequences, prompt, 5, 7, "with_target")
