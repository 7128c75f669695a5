import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.ops import top_k

rank_catalog = jax.jit(top_k.rank_catalog, static_argnums=2)


def mean_rank(scores, target):
    """Brute force: the mean of the target's positions over every way to order the ties."""
    first = 1 + sum(s > scores[target] for s in scores)
    last = sum(s >= scores[target] for s in scores)
    return (first + last) / 2


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 30))
def test_catalog_ranks_agree_with_brute_force_under_ties(seed, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, size=(4, 23)).astype(np.float32)
    targets = generator.integers(0, 23, size=4)
    ranking = rank_catalog(jnp.asarray(scores), jnp.asarray(targets), 10)
    np.testing.assert_array_equal(ranking.target_rank, [mean_rank(s, t) for s, t in zip(scores, targets, strict=True)])
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(ranking.items, expected)
    np.testing.assert_array_equal(ranking.scores, np.take_along_axis(scores, expected, axis=1))
    assert ranking.items.dtype == jnp.int32
    assert ranking.scores.dtype == ranking.target_rank.dtype == jnp.float32


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 30))
def test_rank_in_the_full_list_is_the_rank_in_the_catalog(seed, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, size=(4, 23)).astype(np.float32)
    targets = generator.integers(0, 23, size=4)
    ranking = rank_catalog(jnp.asarray(scores), jnp.asarray(targets), 23)
    in_list = top_k.rank_in_list(ranking.items, ranking.scores, jnp.asarray(targets))
    np.testing.assert_array_equal(in_list, ranking.target_rank)


def test_a_target_outside_the_list_has_no_rank():
    items = jnp.array([[3, 1, 4], [3, 1, -1], [3, 1, -1]])
    scores = jnp.array([[0.9, 0.5, 0.5], [0.9, 0.5, -jnp.inf], [0.9, 0.5, 0.9]])
    ranks = top_k.rank_in_list(items, scores, jnp.array([5, 5, 1]))
    np.testing.assert_array_equal(ranks, [np.inf, np.inf, 2.0])


def test_an_item_listed_twice_counts_once_at_its_best_score():
    ranks = top_k.rank_in_list(jnp.array([[7, 2, 7]]), jnp.array([[0.9, 0.9, 0.1]]), jnp.array([7]))
    np.testing.assert_array_equal(ranks, [1.5])


def test_all_scores_equal_gives_the_middle_rank():
    ranking = rank_catalog(jnp.zeros((1, 101)), jnp.array([0]), 10)
    assert ranking.target_rank[0] == 51


def test_nan_scores_come_last_and_a_nan_target_is_a_miss():
    scores = jnp.array([[jnp.nan, 1.0, 2.0, jnp.nan], [jnp.nan] * 4])
    ranking = rank_catalog(scores, jnp.array([1, 0]), 2)
    np.testing.assert_array_equal(ranking.items[0], [2, 1])
    np.testing.assert_array_equal(ranking.target_rank, [2, np.inf])
    assert top_k.rank_in_list(jnp.array([[0, 1]]), jnp.array([[jnp.nan, 1.0]]), jnp.array([0]))[0] == np.inf


def test_bfloat16_scores_rank_exactly():
    """bfloat16 could not add up thousands of halves."""
    scores = jnp.zeros((1, 5001), jnp.bfloat16)
    ranking = rank_catalog(scores, jnp.array([4000]), 1)
    assert ranking.target_rank[0] == 2501


def test_items_with_score_minus_infinity_or_nan_are_never_recommended():
    scores = jnp.array([[-jnp.inf, 0.5, -jnp.inf, jnp.nan], [0.1, 0.2, 0.3, 0.4]])
    ranking = top_k.rank_catalog(scores, jnp.array([1, 3]), k=3)
    np.testing.assert_array_equal(ranking.items, [[1, -1, -1], [3, 2, 1]])


def test_a_catalog_split_across_devices_is_ranked_as_on_one(on_eight_devices):
    on_eight_devices("tests.ops.sharded_top_k")
