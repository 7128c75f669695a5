import collections

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.interactions import filter_k_core, from_frame, k_core
from simgr_jax.errors import UserError

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)
ROWS = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from("xyzw"), st.integers(0, 5)), min_size=1, max_size=40
)


def frame_of(rows):
    return pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row")


def naive_k_core(pairs, k):
    """Removes one user or item at a time."""
    pairs = list(enumerate(pairs))
    while True:
        users = collections.Counter(user for _, (user, _) in pairs)
        items = collections.Counter(item for _, (_, item) in pairs)
        light = [("user", u) for u, n in users.items() if n < k] + [("item", i) for i, n in items.items() if n < k]
        if not light:
            return {row for row, _ in pairs}
        kind, who = light[0]
        pairs = [(row, pair) for row, pair in pairs if pair[0 if kind == "user" else 1] != who]


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.integers(1, 5))
def test_k_core_equals_removing_one_at_a_time(pairs, k):
    users, items = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    mask = k_core(users, items, k)
    assert set(np.flatnonzero(mask)) == naive_k_core(pairs, k)
    assert k_core(users[mask], items[mask], k).all()  # a fixed point


def test_k_core_goes_on_until_nothing_changes():
    # User 3 has too few interactions; without it, so does item 2, then user 2, then item 1, and finally user 1.
    users = np.array([0, 0, 1, 1, 2, 2, 3])
    items = np.array([0, 0, 0, 1, 1, 2, 2])
    assert k_core(users, items, 2).tolist() == [True, True, False, False, False, False, False]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_dataset_does_not_depend_on_the_order_of_rows(rows, random):
    shuffled = rows + rows[:3]  # duplicates count once
    random.shuffle(shuffled)
    a, b = from_frame(frame_of(rows), "x"), from_frame(frame_of(shuffled), "x")
    assert (a.user_ids, a.item_ids) == (b.user_ids, b.item_ids)
    np.testing.assert_array_equal(a.sequences.values, b.sequences.values)
    np.testing.assert_array_equal(a.sequences.offsets, b.sequences.offsets)
    np.testing.assert_array_equal(a.timestamps, b.timestamps)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_dataset_is_the_log_sorted_and_without_duplicates(rows):
    dataset = from_frame(frame_of(rows), "x")
    got = [
        (user, dataset.item_ids[item], int(time))
        for user, items, times in zip(
            dataset.user_ids,
            dataset.sequences,
            Sequences(dataset.timestamps, dataset.sequences.offsets),
            strict=True,
        )
        for item, time in zip(items, times, strict=True)
    ]
    assert got == sorted(set(rows), key=lambda row: (row[0], row[2], row[1]))
    assert dataset.user_ids == sorted({row[0] for row in rows})
    assert dataset.item_ids == sorted({row[1] for row in rows})


def test_fractions_of_a_second_decide_the_order():
    frame = pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "timestamp": [7.75, 7.25]})
    dataset = from_frame(frame, "x")
    assert [dataset.item_ids[i] for i in dataset.sequences[0]] == ["b", "a"]
    assert dataset.timestamps.tolist() == [7, 7]


def test_k_core_of_a_log_drops_users_items_and_texts():
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("v", "c", 3), ("w", "c", 1)]
    dataset = from_frame(frame_of(rows), "x", k_core=2, item_texts={"a": "apple", "c": "cherry"})
    assert (dataset.user_ids, dataset.item_ids, dataset.item_texts) == (["u", "v"], ["a", "b"], ["apple", ""])
    assert [s.tolist() for s in dataset.sequences] == [[0, 1], [0, 1]]
    assert dataset.timestamps.tolist() == [1, 2, 1, 2]


def test_k_core_of_a_dataset_keeps_everything_aligned():
    dataset = Dataset(
        name="x",
        user_ids=["u", "v", "w"],
        item_ids=["a", "b", "c", "d"],
        sequences=Sequences.from_lists([[3, 1], [0, 3, 1], [0]]),
        timestamps=np.array([1, 2, 3, 4, 5, 6]),
        item_texts=["A", "B", "C", "D"],
        codes=np.array([[0, 0], [1, 1], [2, 2], [3, 3]], dtype=np.int32),
        codebook_sizes=(4, 4),
        parts=np.array([0, 1, 0, 0, 2, 0], dtype=np.uint8),
    )
    core = filter_k_core(dataset, 2)
    assert (core.user_ids, core.item_ids, core.item_texts) == (["u", "v"], ["b", "d"], ["B", "D"])
    assert [s.tolist() for s in core.sequences] == [[1, 0], [1, 0]]
    assert core.timestamps.tolist() == [1, 2, 4, 5]
    assert core.codes.tolist() == [[1, 1], [3, 3]]
    assert core.codebook_sizes == (4, 4)
    assert core.parts.tolist() == [0, 1, 0, 2]


def test_an_empty_k_core_is_an_error():
    with pytest.raises(UserError, match=r"config\.data\.k_core"):
        from_frame(frame_of([("u", "a", 1)]), "x", k_core=2)
    dataset = Dataset("x", ["u"], ["a"], Sequences.from_lists([[0]]))
    with pytest.raises(UserError, match=r"config\.data\.k_core"):
        filter_k_core(dataset, 2)
