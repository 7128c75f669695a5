import jax
import jax.numpy as jnp
import numpy as np

from simgr_jax.ops.causal_convolution import causal_convolution, continued_convolution, last_inputs

X = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def alone(x, kernel):
    """The convolution of one whole sequence [T, C], float64."""
    padded = np.concatenate([np.zeros((kernel.shape[1] - 1, x.shape[1])), x.astype(np.float64)])
    return np.stack([(padded[t : t + kernel.shape[1]] * kernel.T).sum(0) for t in range(len(x))])


def test_each_segment_is_convolved_alone():
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    mixed = causal_convolution(X, KERNEL, segment_ids)
    for row, ids in enumerate(segment_ids):
        expected = np.concatenate([alone(X[row, ids == segment], KERNEL) for segment in dict.fromkeys(ids)])
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_crosses_a_segments_border():
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * 2, np.int32)
    gradient = jax.grad(lambda x: causal_convolution(x, KERNEL, segment_ids)[:, 4:].sum())(jnp.asarray(X))
    assert not gradient[:, :4].any()
    assert np.asarray(gradient[:, 4:]).all()


def test_a_continued_convolution_equals_one_at_once():
    known = 1  # Fewer than the kernel sees.
    whole = causal_convolution(X, KERNEL, np.ones((2, 9), np.int32))
    past, values = last_inputs(jnp.asarray(X), jnp.full(2, known), 3), []
    for start, stop in ((1, 6), (6, 9)):
        mixed, past = continued_convolution(X[:, start:stop], KERNEL, past)
        values.append(mixed)
    np.testing.assert_allclose(np.concatenate(values, axis=1), whole[:, known:], rtol=1e-6, atol=1e-6)


def test_the_last_inputs_of_a_short_history_begin_with_zeros():
    kept = last_inputs(jnp.asarray(X), jnp.array([2, 7]), 3)
    np.testing.assert_array_equal(kept[0], np.concatenate([np.zeros((1, 3)), X[0, :2]]))
    np.testing.assert_array_equal(kept[1], X[1, 4:7])


def test_bfloat16_is_summed_in_float32():
    narrow = jnp.asarray(X, jnp.bfloat16)
    mixed = causal_convolution(narrow, KERNEL, np.ones((2, 9), np.int32))
    assert mixed.dtype == jnp.bfloat16
    exact = np.stack([alone(np.asarray(row, np.float32), KERNEL) for row in narrow])
    np.testing.assert_array_equal(mixed, jnp.asarray(exact, jnp.bfloat16))
