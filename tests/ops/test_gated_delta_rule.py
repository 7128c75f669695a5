"""The gated delta rule in chunks against the plain recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgr_jax.ops import gated_delta_rule as module

HEADS, KEY, VALUE = 2, 5, 3
gated_delta_rule = jax.jit(module.gated_delta_rule)


def inputs(batch, length, seed=0, decay=1.0):
    """Queries, keys of length 1, values, log decays and betas, float64."""
    rng = np.random.default_rng(seed)
    random = lambda *axes: rng.normal(size=(batch, length, HEADS, *axes))  # noqa: E731
    key = random(KEY)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    return random(KEY), key, random(VALUE), -decay * np.abs(random()), rng.uniform(size=(batch, length, HEADS))


def recurrence(query, key, value, log_decay, beta, segment_ids, state=None):
    """One step for each position, in the inputs' dtype."""
    batch, length = segment_ids.shape
    state = np.zeros((batch, HEADS, KEY, VALUE)) if state is None else state.copy()
    outputs = np.zeros_like(value)
    for row, head in np.ndindex(batch, HEADS):
        own = state[row, head]
        for t in range(length):
            if t and segment_ids[row, t] != segment_ids[row, t - 1]:
                own = np.zeros_like(own)
            own = np.exp(log_decay[row, t, head]) * own
            error = value[row, t, head] - own.T @ key[row, t, head]
            own = own + beta[row, t, head] * np.outer(key[row, t, head], error)
            outputs[row, t, head] = own.T @ query[row, t, head]
        state[row, head] = own
    return outputs, state


def narrow(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 4 positions."""
    monkeypatch.setattr(module, "_CHUNK", 4)


# Within chunks, at their borders, in several successive chunks, and a row of padding.
SEGMENTS = np.array(
    [[1] * 11, [1, 1, 2, 2, 2, 3, 3, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5], [1] + [2] * 10, [0] * 11], np.int32
)


def test_equals_the_recurrence_for_packed_segments(short_chunks):
    arrays = inputs(5, 11)
    outputs, state = gated_delta_rule(*narrow(arrays), SEGMENTS)
    expected, expected_state = recurrence(*arrays, SEGMENTS)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, rtol=1e-4, atol=1e-5)


def test_equals_the_recurrence_for_more_than_a_whole_chunk():
    arrays, segment_ids = inputs(1, 150, decay=0.05), np.repeat([[1, 2]], [90, 60], axis=1).astype(np.int32)
    outputs, state = gated_delta_rule(*narrow(arrays), segment_ids)
    expected, expected_state = recurrence(*arrays, segment_ids)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, rtol=1e-4, atol=1e-5)


def test_stays_exact_for_equal_keys_that_forget_nothing():
    """The hardest triangular system: each position overwrites what the one before wrote."""
    query, key, value, log_decay, beta = inputs(1, 64)
    key[:], log_decay[:], beta[:] = key[:, :1], 0, 1
    arrays, segment_ids = (query, key, value, log_decay, beta), np.ones((1, 64), np.int32)
    outputs, _ = gated_delta_rule(*narrow(arrays), segment_ids)
    np.testing.assert_allclose(outputs, recurrence(*arrays, segment_ids)[0], rtol=1e-4, atol=1e-4)


def test_goes_on_from_a_state(short_chunks):
    arrays = inputs(5, 11)
    first, second = ([x[:, part] for x in (*narrow(arrays), SEGMENTS)] for part in (slice(7), slice(7, None)))
    outputs, state = gated_delta_rule(*first)
    # A state is that of the row's first segment, so rows with a border there begin anew.
    is_same = SEGMENTS[:, 6] == SEGMENTS[:, 7]
    more, last = gated_delta_rule(*second, jnp.where(is_same[:, None, None, None], state, 0))
    whole, expected = gated_delta_rule(*narrow(arrays), SEGMENTS)
    np.testing.assert_allclose(np.concatenate([outputs, more], axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_differences_of_the_recurrence(short_chunks):
    arrays, rng = inputs(5, 11), np.random.default_rng(3)
    cotangent, state_cotangent = rng.normal(size=(5, 11, HEADS, VALUE)), rng.normal(size=(5, HEADS, KEY, VALUE))

    def loss(rule, *arrays):
        outputs, state = rule(*arrays, SEGMENTS)
        return (outputs * cotangent).sum() + (state * state_cotangent).sum()

    gradients = jax.jit(jax.grad(lambda *arrays: loss(module.gated_delta_rule, *arrays), argnums=range(5)))
    every = gradients(*narrow(arrays))
    for number, gradient in enumerate(every):
        direction = rng.normal(size=gradient.shape)
        after, before = (
            loss(recurrence, *arrays[:number], arrays[number] + step * direction, *arrays[number + 1 :])
            for step in (1e-6, -1e-6)
        )
        difference = (after - before) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-3)


def test_bfloat16_inputs_are_computed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(2, 9)]
    outputs, state = gated_delta_rule(*arrays, jnp.ones((2, 9), jnp.int32))
    assert (outputs.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = gated_delta_rule(*(x.astype(jnp.float32) for x in arrays), jnp.ones((2, 9), jnp.int32))
    np.testing.assert_array_equal(outputs, exact.astype(jnp.bfloat16))


def test_no_triangular_system_is_solved_by_a_library():
    """On CPUs, jaxlib's solver for batches hangs if it runs as often at once as there are cores."""
    loss = lambda *arrays: module.gated_delta_rule(*arrays, SEGMENTS)[0].sum()  # noqa: E731
    assert "triangular_solve" not in str(
        jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*narrow(inputs(5, 11)))
    )


def test_the_inverse_of_a_chunks_system_is_accurate():
    """With keys that are all alike, as a system is worst; also of a size that is no power of two."""
    for size in (1, 2, 11, 64):
        below = np.tril(np.ones((size, size)), -1) * np.random.default_rng(0).uniform(0.9, 1, (size, size))
        found = module._unit_lower_inverse(jnp.asarray(below[None], jnp.float32))[0]
        np.testing.assert_allclose(found, np.linalg.inv(np.eye(size) + below), atol=1e-5)
