"""Sequences and prompts that the tests of this folder share, and the plain way to cut and render them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.inputs.prompts import Prompt

LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=12)
ITEMS = 23 * 12


def distinct_items(lengths: list[int]) -> Sequences:
    """Sequences in which no item occurs twice, so that an item tells the user and the position."""
    return Sequences.from_lengths(np.arange(sum(lengths)), np.array(lengths))


@st.composite
def prompts(draw) -> Prompt:
    """Pieces of 1 to 5 inputs, which differ for each item; a prefix of up to 3 inputs; and perhaps merged inputs."""
    prefix, merged = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    sizes = np.random.default_rng(draw(st.integers(0, 100))).integers(1 + merged, 6, ITEMS)
    values = np.concatenate([10 * item + np.arange(size) for item, size in enumerate(sizes)])
    return Prompt(np.arange(prefix, dtype=np.int32) + 10 * ITEMS, Sequences.from_lengths(values, sizes), merged)


def rendered(prompt: Prompt, items: list[int]) -> tuple[list[int], list[int]]:
    """The prompt's inputs, and the position of each item's last one."""
    inputs, places = prompt.prefix.tolist(), []
    for index, item in enumerate(items):
        inputs += prompt.pieces[item].tolist()[prompt.merged if index == 0 else 0 :]
        places.append(len(inputs) - 1)
    return inputs, places


def newest(prompt: Prompt, items: list[int], max_items: int, row_length: int) -> list[int]:
    """As many of the newest items as are allowed."""
    kept = len(items)
    while kept > max_items or len(rendered(prompt, items[len(items) - kept :])[0]) > row_length:
        kept -= 1
    return items[len(items) - kept :]


def windows_of(sequence: np.ndarray, prompt: Prompt, max_items: int, row_length: int) -> Iterator[tuple[int, ...]]:
    """A sequence's windows, each as its items and the item after them."""
    left = sequence.tolist()
    while len(left) > 1:
        window = newest(prompt, left[:-1], max_items, row_length)
        yield (*window, left[-1])
        left = left[: len(left) - len(window)]


def windows_in(batch: TrainBatch, prompt: Prompt) -> Iterator[tuple[int, ...]]:
    """The windows that are packed in a batch, each as its items and the item after them. Checks everything else about
    the batch."""
    for inputs, ids, positions, readouts, last_items, targets, valid in zip(*batch, strict=True):
        assert (np.diff(valid.astype(int)) <= 0).all()
        assert (np.diff(readouts[valid]) > 0).all()
        for segment in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            here = valid & np.isin(readouts, places)
            window = (targets[here][0] - 1, *targets[here].tolist())  # `distinct_items` counts upward.
            expected, ends = rendered(prompt, window[:-1])
            assert last_items[here].tolist() == list(window[:-1])
            assert inputs[places].tolist() == expected
            assert (readouts[here] - places[0]).tolist() == ends
            yield window
        assert not inputs[ids == 0].any()
        assert set(readouts[valid]) <= set(np.flatnonzero(ids))
