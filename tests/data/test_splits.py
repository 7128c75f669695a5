import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data import splits
from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError


def dataset_of(sequences, timestamps=None, parts=None):
    sequences = Sequences.from_lists(sequences)
    num_items = int(sequences.values.max()) + 1
    return Dataset(
        name="x",
        user_ids=[f"u{i}" for i in range(len(sequences))],
        item_ids=[f"i{i}" for i in range(num_items)],
        sequences=sequences,
        timestamps=None if timestamps is None else np.array(timestamps),
        parts=None if parts is None else np.array(parts, dtype=np.uint8),
    )


def cases_of(cases):
    histories = [history.tolist() for history in cases.histories]
    return list(zip(cases.users.tolist(), histories, cases.targets.tolist(), strict=True))


def lists_of(sequences):
    return [sequence.tolist() for sequence in sequences]


def test_leave_one_out_holds_out_the_last_two_items():
    split = splits.leave_one_out(dataset_of([[0, 1, 2, 3], [4, 5, 4], [1, 1, 1, 1, 1]]))
    assert lists_of(split.train) == [[0, 1], [1, 1, 1]]  # the second user has one item left, which makes no pair
    assert cases_of(split.validation) == [(0, [0, 1], 2), (1, [4], 5), (2, [1, 1, 1], 1)]
    assert cases_of(split.test) == [(0, [0, 1, 2], 3), (1, [4, 5], 4), (2, [1, 1, 1, 1], 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=9), min_size=1, max_size=20))
def test_leave_one_out_equals_slices(sequences):
    dataset = dataset_of([*sequences, [0, 1, 2, 3]])
    split = splits.leave_one_out(dataset)
    everyone = lists_of(dataset.sequences)
    assert lists_of(split.train) == [s[:-2] for s in everyone if len(s) >= 4]
    assert cases_of(split.validation) == [(u, s[:-2], s[-2]) for u, s in enumerate(everyone)]
    assert cases_of(split.test) == [(u, s[:-1], s[-1]) for u, s in enumerate(everyone)]


def test_users_with_too_few_items_train_and_are_no_cases(caplog):
    split = splits.leave_one_out(dataset_of([[0, 1, 2, 3], [0, 1], [2], [3, 2, 1]]))
    assert lists_of(split.train) == [[0, 1], [0, 1]]
    assert cases_of(split.validation) == [(0, [0, 1], 2), (3, [3], 2)]
    assert cases_of(split.test) == [(0, [0, 1, 2], 3), (3, [3, 2], 1)]
    assert "2 of 4 users have fewer and are left out of validation and test, and the 1 among them" in caplog.text


def test_without_short_users_nothing_is_said(caplog):
    splits.leave_one_out(dataset_of([[0, 1, 2, 3], [3, 2, 1]]))
    assert not caplog.text


def test_data_of_short_users_only_is_refused():
    with pytest.raises(UserError, match="leaves nothing to validate on; give users with 4 interactions or more"):
        splits.leave_one_out(dataset_of([[0, 1], [1, 2], [2]]))


def test_targets_at_the_time_of_the_item_before_them_are_marked():
    split = splits.leave_one_out(dataset_of([[0, 1, 2, 3], [3, 2, 1]], timestamps=[1, 2, 2, 3, 0.25, 0.5, 0.5]))
    assert split.validation.tied.tolist() == [True, False]
    assert split.test.tied.tolist() == [False, True]
    assert splits.leave_one_out(dataset_of([[0, 1, 2, 3]])).test.tied is None


def test_temporal_cuts_all_users_at_the_same_times():
    dataset = dataset_of([[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]], timestamps=[0, 1, 2, 6, 8, 3, 4, 9, 5, 7])
    split = splits.temporal(dataset, validation_fraction=0.2, test_fraction=0.2)
    # By time: 0 1 2 5 6 8 | 3 9 | 4 7
    assert lists_of(split.train) == [[0, 1, 2], [5, 6]]
    assert cases_of(split.validation) == [(0, [0, 1, 2], 3), (2, [8], 9)]
    assert cases_of(split.test) == [(0, [0, 1, 2, 3], 4), (1, [5, 6], 7)]


def test_temporal_makes_no_case_without_a_history():
    # User 1 starts in the test window: only the second of the two items is a case.
    dataset = dataset_of([[0, 1, 2, 3, 4, 5], [6, 7]], timestamps=[0, 1, 2, 3, 4, 5, 10, 11])
    split = splits.temporal(dataset, 0.25, 0.25)
    assert cases_of(split.test) == [(1, [6], 7)]


def test_temporal_keeps_ties_on_one_side():
    dataset = dataset_of([[0, 1, 2, 3, 4, 5, 6, 7]], timestamps=[0, 1, 2, 5, 5, 5, 9, 9])
    split = splits.temporal(dataset, 0.25, 0.125)
    # The cuts fall within the ties at 5 and at 9.
    assert lists_of(split.train) == [[0, 1, 2]]
    assert split.validation.targets.tolist() == [3, 4, 5]
    assert split.test.targets.tolist() == [6, 7]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=5, max_size=20), st.data())
def test_temporal_never_looks_ahead(times, data):
    times = [sorted(user) for user in times] + [list(range(0, 60, 2))]
    dataset = dataset_of([list(range(len(user))) for user in times], np.concatenate(times))
    fractions = data.draw(st.sampled_from([(0.1, 0.1), (0.2, 0.3)]))
    try:
        split = splits.temporal(dataset, *fractions)
    except UserError:
        return  # a part is empty: ties in time, or only first items
    # A user's item t is at position t, so the time of any (user, item) is known.
    when = lambda cases: [times[user][item] for user, item in zip(cases.users, cases.targets, strict=True)]  # noqa: E731
    validation, test = when(split.validation), when(split.test)
    assert max(validation) < min(test)
    assert len([t for user in times for t in user if t >= min(test)]) >= len(test)
    for cases in (split.validation, split.test):
        assert all(history.tolist() == list(range(target)) for _, history, target in _rows(cases))
    trained = {tuple(sequence.tolist()) for sequence in split.train}
    allowed = {tuple(range(sum(t < min(validation) for t in user))) for user in times}
    assert trained <= allowed


def _rows(cases):
    return zip(cases.users, cases.histories, cases.targets, strict=True)


def test_given_uses_the_published_split():
    dataset = dataset_of([[0, 1, 2, 3], [4, 5], [6, 7]], parts=[0, 0, 1, 2, 0, 2, 1, 1])
    split = splits.given(dataset)
    assert lists_of(split.train) == [[0, 1]]
    assert cases_of(split.validation) == [(0, [0, 1], 2), (2, [6], 7)]
    assert cases_of(split.test) == [(0, [0, 1, 2], 3), (1, [4], 5)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: splits.temporal(d, 0.1, 0.1), r"config\.data\.split: temporal needs timestamps"),
        (lambda d: splits.given(d), r"config\.data\.split: this data has no split of its own"),
        (lambda d: splits.leave_one_out(d), r"config\.data\.split: leaves nothing to train on; give users with 4"),
    ],
)
def test_a_split_that_the_data_does_not_allow_is_an_error(make, message):
    with pytest.raises(UserError, match=message):
        make(dataset_of([[0, 1, 2], [2, 1, 0]]))


@pytest.mark.parametrize(
    ("fractions", "key"),
    [((0.0, 0.1), "validation_fraction"), ((0.1, 1.5), "test_fraction"), ((0.5, 0.5), "test_fraction")],
)
def test_fractions_that_leave_nothing_are_named(fractions, key):
    with pytest.raises(UserError, match=rf"config\.data\.{key}"):
        splits.temporal(dataset_of([[0, 1, 2]], timestamps=[1, 2, 3]), *fractions)


def test_interactions_of_one_moment_can_not_be_split():
    with pytest.raises(UserError, match=r"leaves nothing to train on; change config\.data\.validation_fraction"):
        splits.temporal(dataset_of([[0, 1, 2, 3]], timestamps=[5, 5, 5, 5]), 0.25, 0.25)
