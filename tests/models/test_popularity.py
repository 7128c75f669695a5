import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.models import popularity
from simgr_jax.ops.top_k import rank_catalog


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_rank_catalog_on_the_counts(seed):
    generator = np.random.default_rng(seed)
    train = Sequences.from_lists([generator.integers(0, 30, size=generator.integers(2, 9)) for _ in range(12)])
    targets = generator.integers(0, 40, size=6)  # Items 30 to 39 never occur in training.
    counts = np.array([(train.values == item).sum() for item in range(40)], dtype=np.float32)
    expected = rank_catalog(jnp.tile(counts, (6, 1)), jnp.asarray(targets), 10)
    ranking = popularity.rank(train, 40, targets, 10)
    for got, want in zip(ranking, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_lists_longer_than_the_catalog_are_refused():
    with pytest.raises(ValueError, match="larger than the catalog"):
        popularity.rank(Sequences.from_lists([[0, 1]]), 3, np.array([0]), 10)
