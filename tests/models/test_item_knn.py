import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.models import item_knn

NUM_ITEMS = 12  # The last two occur in no sequence.


def random_sequences(seed: int) -> Sequences:
    """Sequences of ten items; some occur twice in a sequence."""
    rng = np.random.default_rng(seed)
    return Sequences.from_lists(rng.integers(0, NUM_ITEMS - 2, rng.integers(2, 7)) for _ in range(9))


def brute_force(train: Sequences, count: int, shrinkage: float) -> np.ndarray:
    """float64 [N, N]: the weight of j among the neighbors of i, 0 where it is not one."""
    buyers = [{user for user, items in enumerate(train) if item in items} for item in range(NUM_ITEMS)]
    weights = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for i in range(NUM_ITEMS):
        alike = []
        for j in range(NUM_ITEMS):
            shared = len(buyers[i] & buyers[j])
            if i != j and shared:
                alike.append((-shared / (np.sqrt(len(buyers[i]) * len(buyers[j])) + shrinkage), j))
        for weight, j in sorted(alike)[:count]:
            weights[i, j] = -weight
    return weights


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, NUM_ITEMS + 3), shrinkage=st.sampled_from([0.0, 1.5, 10.0]))
def test_the_neighbors_are_the_items_that_share_most_users(seed, count, shrinkage):
    train = random_sequences(seed)
    items, weights = item_knn.neighbors(train, NUM_ITEMS, count, shrinkage)
    assert items.shape == weights.shape == (NUM_ITEMS, min(count, NUM_ITEMS))
    assert (items.dtype, weights.dtype) == (np.int32, np.float32)
    assert (np.diff(weights) <= 0).all()
    found = np.zeros((NUM_ITEMS, NUM_ITEMS))
    np.add.at(found, (np.arange(NUM_ITEMS)[:, None], items), weights)
    np.testing.assert_allclose(found, brute_force(train, count, shrinkage), rtol=1e-6)


@pytest.mark.parametrize("filter_history", [False, True])
def test_a_history_is_scored_by_the_neighbors_of_all_its_items(filter_history):
    train = random_sequences(0)
    # One has an item twice, and one has only items without neighbors.
    histories = [[1, 4, 7], [3], [2, 2, 11], [10, 11]]
    inputs, history = np.zeros((4, 5), np.int32), np.full((4, 8), -1, np.int32)
    for row, items in enumerate(histories):
        inputs[row, : len(items)] = history[row, : len(items)] = items
    targets = np.array([0, 4, 2, 10], np.int32)
    expected = np.stack([brute_force(train, 4, 2.0)[items].sum(axis=0) for items in histories])
    if filter_history:
        for row, items in zip(expected, histories, strict=True):
            row[items] = -np.inf

    model = item_knn.ItemKNN(*item_knn.neighbors(train, NUM_ITEMS, 4, 2.0))
    batch = RankBatch(inputs, np.array([3, 1, 3, 2], np.int32), history, targets)
    ranking = jax.jit(lambda batch: model.rank(batch, model.catalog(), NUM_ITEMS, filter_history))(batch)
    for row in range(4):
        listed = ranking.items[row] >= 0
        np.testing.assert_allclose(ranking.scores[row, listed], expected[row][ranking.items[row, listed]], rtol=1e-6)
        assert set(ranking.items[row, listed].tolist()) == set(np.flatnonzero(np.isfinite(expected[row])))
        ahead, tied = (
            (compare(expected[row], expected[row, targets[row]])).sum() for compare in (np.greater, np.equal)
        )
        is_ruled_out = np.isinf(expected[row, targets[row]])
        assert ranking.target_rank[row] == (np.inf if is_ruled_out else ahead + (tied + 1) / 2)


def test_an_item_that_is_too_old_to_be_read_is_filtered_but_not_scored():
    """The history has all items, the inputs only the newest."""
    train = random_sequences(0)
    model = item_knn.ItemKNN(*item_knn.neighbors(train, NUM_ITEMS, 4, 2.0))
    batch = RankBatch(np.array([[3]]), np.array([1]), np.array([[7, 3]]), np.array([7]))
    ranking = model.rank(batch, model.catalog(), NUM_ITEMS, True)
    expected = brute_force(train, 4, 2.0)[3]
    listed = ranking.items[0] >= 0
    np.testing.assert_allclose(ranking.scores[0, listed], expected[ranking.items[0, listed]], rtol=1e-6)
    assert set(ranking.items[0, listed].tolist()) == set(range(NUM_ITEMS)) - {3, 7}
    assert ranking.target_rank[0] == np.inf


@pytest.mark.parametrize(("key", "value"), [("neighbors", 0), ("shrinkage", -1.0)])
def test_an_impossible_option_is_named_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"^config\.item_knn\.{key}: can't be {value}; give"):
        item_knn.Options(**{key: value})
