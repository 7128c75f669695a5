import collections
import hashlib

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.interactions import by_rank, filter_k_core, from_frame, k_core, tie_order
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
    assert [(user, time) for user, _, time in got] == sorted((user, time) for user, _, time in set(rows))
    assert sorted(got) == sorted(set(rows))
    assert dataset.user_ids == sorted({row[0] for row in rows})
    assert dataset.item_ids == sorted({row[1] for row in rows})


def test_fractions_of_a_second_decide_the_order():
    frame = pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "timestamp": [7.75, 7.25]})
    dataset = from_frame(frame, "x")
    assert [dataset.item_ids[i] for i in dataset.sequences[0]] == ["b", "a"]
    assert dataset.timestamps.tolist() == [7.25, 7.75]


def reference_tie(user, item):
    """`tie_order` of one interaction, in Python's integers."""
    digest = lambda text: int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")  # noqa: E731
    size = 2**64
    mixed = digest(user) ^ (digest(item) * 0x9E3779B97F4A7C15 % size)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % size
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % size
    return mixed ^ (mixed >> 31)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("aé😀", max_size=3), st.text("xyß", max_size=3)), min_size=1, max_size=30))
def test_ties_in_time_are_broken_by_a_hash_of_user_and_item(pairs):
    dataset = from_frame(frame_of([(user, item, 5) for user, item in pairs]), "x")
    for user, items in zip(dataset.user_ids, dataset.sequences, strict=True):
        bought = {item for name, item in pairs if name == user}
        expected = sorted(bought, key=lambda item: reference_tie(user, item))
        assert [dataset.item_ids[item] for item in items] == expected


def test_the_order_of_ties_is_the_same_everywhere():
    """These numbers must never change: the order of ties, and with it results, would."""
    tie = tie_order(*(by_rank(pl.Series(ids)) for ids in (["u", "u", "Größe"], ["a", "b", "a"])))
    assert tie.tolist() == [16858845297192476120, 10532866445044673317, 2247576098914329026]


def test_the_order_of_ties_tells_nothing_about_the_next_item():
    """On noise, no constant list does better than chance, 10 of 200: it did if ties followed the items' ids."""
    generator = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item:03}", 7) for user in range(4000) for item in generator.choice(200, 8, replace=False)]
    dataset = from_frame(frame_of(rows), "x")
    last = dataset.sequences.values[dataset.sequences.offsets[1:] - 1]
    best = np.sort(np.bincount(last, minlength=200))[-10:].sum() / len(last)
    assert best < 0.09  # the ten most frequent of 200 equally likely


def test_what_a_log_loses_is_noted():
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("v", "c", 3), ("w", "c", 1)]
    assert from_frame(frame_of(rows), "x").notes == ()
    assert from_frame(frame_of(rows + rows[:2]), "x", k_core=2).notes == (
        "2 of 8 interactions repeat another's user, item and timestamp, and are left out",
        "config.data.k_core=2 leaves out 1 of 3 users, 1 of 3 items and 2 of 6 interactions",
    )
    assert from_frame(frame_of(rows[:4]), "x", k_core=2).notes == ()


def test_items_without_interactions_stay_if_that_is_asked_for():
    rows = [("u", "b", 1), ("u", "d", 2), ("v", "b", 1), ("v", "d", 3), ("v", "c", 2)]
    texts = {"d": "date", "a": "apple", "b": "bread", "c": "cheese", "e": "egg"}
    dataset = from_frame(frame_of(rows), "x", 2, texts, keep_cold_items=True)
    assert dataset.item_ids == ["a", "b", "c", "d", "e"]  # c has too few interactions, a and e have none
    assert dataset.item_texts == ["apple", "bread", "cheese", "date", "egg"]
    assert [s.tolist() for s in dataset.sequences] == [[1, 3], [1, 3]]
    assert dataset.notes == ("config.data.k_core=2 leaves out 0 of 2 users, 0 of 5 items and 1 of 5 interactions",)
    assert from_frame(frame_of(rows), "x", 0, texts).item_ids == ["b", "c", "d"]


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
    assert core.notes == ("config.data.k_core=2 leaves out 1 of 3 users, 2 of 4 items and 2 of 6 interactions",)


def test_an_empty_k_core_is_an_error():
    with pytest.raises(UserError, match=r"config\.data\.k_core"):
        from_frame(frame_of([("u", "a", 1)]), "x", k_core=2)
    dataset = Dataset("x", ["u"], ["a"], Sequences.from_lists([[0]]))
    with pytest.raises(UserError, match=r"config\.data\.k_core"):
        filter_k_core(dataset, 2)
