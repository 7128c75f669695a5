import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models import user_pooling

HIDDEN = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])


def prefix_state(name, prefix, score):
    """The pooled state of one prefix, [t, D] -> [D], float64."""
    prefix = prefix.astype(np.float64)
    if name == "last":
        return prefix[-1]
    if name == "mean":
        return prefix.mean(axis=0)
    weights = np.exp(prefix @ score)
    return (weights / weights.sum()) @ prefix


@pytest.mark.parametrize("name", user_pooling.POOLINGS)
def test_the_state_after_each_position_is_that_of_its_prefix(name):
    pooling = user_pooling.create(name, 5, nnx.Rngs(0))
    score = np.array([3.0, -2.0, 1.0, 0.5, -1.0])
    if name == "attention":
        pooling.score.kernel[...] = jnp.asarray(score[:, None], jnp.float32)
    states = pooling(jnp.asarray(HIDDEN), jnp.asarray(SEGMENT_IDS))
    for row, t in np.ndindex(2, 7):
        first = np.flatnonzero(SEGMENT_IDS[row] == SEGMENT_IDS[row, t])[0]
        expected = prefix_state(name, HIDDEN[row, first : t + 1], score)
        np.testing.assert_allclose(states[row, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "attention"])
def test_bfloat16_states_are_pooled_in_float32(name):
    pooling = user_pooling.create(name, 5, nnx.Rngs(0))
    narrow = jnp.asarray(HIDDEN, jnp.bfloat16)
    states = pooling(narrow, jnp.asarray(SEGMENT_IDS))
    assert states.dtype == jnp.float32
    np.testing.assert_array_equal(states, pooling(narrow.astype(jnp.float32), jnp.asarray(SEGMENT_IDS)))


def test_large_scores_do_not_overflow():
    pooling = user_pooling.create("attention", 5, nnx.Rngs(0))
    pooling.score.kernel[...] = jnp.full((5, 1), 1e3)
    assert np.isfinite(pooling(jnp.asarray(HIDDEN), jnp.asarray(SEGMENT_IDS))).all()


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="no user pooling 'max'"):
        user_pooling.create("max", 5, nnx.Rngs(0))
