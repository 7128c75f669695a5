import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.models import popularity
from simgr_jax.ops.top_k import rank_catalog, without_history


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_ranks_are_those_of_rank_catalog_on_the_counts(seed):
    generator = np.random.default_rng(seed)
    train = Sequences.from_lists([generator.integers(0, 30, size=generator.integers(2, 9)) for _ in range(12)])
    targets = generator.integers(0, 40, size=6)  # Items 30 to 39 never occur in training.
    counts = np.array([(train.values == item).sum() for item in range(40)], dtype=np.float32)
    expected = rank_catalog(jnp.tile(counts, (6, 1)), jnp.asarray(targets), 10)
    ranking = popularity.rank(train, 40, targets, 10)
    for got, want in zip(ranking, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 10, 20]), most=st.integers(1, 40))
def test_ranks_without_history_are_those_of_rank_catalog(seed, k, most):
    """Also where counts tie, an item occurs twice in a history, or a history leaves fewer than k items."""
    generator = np.random.default_rng(seed)
    train = Sequences.from_lists([generator.integers(0, 15, size=generator.integers(2, 9)) for _ in range(12)])
    histories = [generator.integers(0, 20, size=generator.integers(1, most + 1)) for _ in range(6)]
    targets = generator.integers(0, 20, size=6)  # Items 15 to 19 never occur in training.
    counts = np.bincount(train.values, minlength=20).astype(np.float32)
    padded = np.stack([np.pad(items, (0, 40 - len(items)), constant_values=-1) for items in histories])
    scores = without_history(jnp.tile(counts, (6, 1)), jnp.asarray(padded))
    expected = rank_catalog(scores, jnp.asarray(targets), k)
    cases = EvaluationCases(np.arange(6), Sequences.from_lists(histories), targets)
    ranking = popularity.rank_without_history(train, 20, cases, k)
    for got, want in zip(ranking, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_lists_longer_than_the_catalog_are_refused():
    with pytest.raises(ValueError, match="larger than the catalog"):
        popularity.rank(Sequences.from_lists([[0, 1]]), 3, np.array([0]), 10)
