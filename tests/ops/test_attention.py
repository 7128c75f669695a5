import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgr_jax.ops.attention import attention, causal_segment_mask


def reference(query, key, value, segment_ids):
    """Float64, one query at a time; query head h reads key head h // (H / Hkv)."""
    output = np.zeros_like(query)
    rows, length, heads, width = query.shape
    for row, t, head in np.ndindex(rows, length, heads):
        seen = [s for s in range(t + 1) if segment_ids[row, s] == segment_ids[row, t]]
        group = head // (heads // key.shape[2])
        scores = key[row, seen, group] @ query[row, t, head] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        output[row, t, head] = weights / weights.sum() @ value[row, seen, group]
    return output


def qkv(heads, kv_heads, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(2, 7, h, 4)) for h in (heads, kv_heads, kv_heads)]


SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_numpy_within_segments_for_any_grouping_of_heads(kv_heads):
    arrays = qkv(4, kv_heads)
    output = attention(*[jnp.asarray(x, jnp.float32) for x in arrays], jnp.asarray(SEGMENT_IDS))
    np.testing.assert_allclose(output, reference(*arrays, SEGMENT_IDS), rtol=1e-5, atol=1e-6)


def test_grouped_heads_equal_repeated_heads():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in qkv(4, 2))
    grouped = attention(query, key, value, jnp.asarray(SEGMENT_IDS))
    repeated = attention(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2), jnp.asarray(SEGMENT_IDS))
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)


def test_mask_is_causal_and_within_a_segment():
    mask = causal_segment_mask(jnp.asarray(SEGMENT_IDS[:1]))[0]
    expected = np.zeros((7, 7), bool)
    for first, end in [(0, 3), (3, 5), (5, 7)]:
        expected[first:end, first:end] = np.tri(end - first, dtype=bool)
    np.testing.assert_array_equal(mask, expected)


def test_a_row_of_padding_alone_has_finite_values_and_gradients():
    arrays = [jnp.asarray(x, jnp.float32) for x in qkv(2, 2)]
    total = lambda query, key, value: attention(query, key, value, jnp.zeros((2, 7), jnp.int32)).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)
    assert all(np.isfinite(x).all() for x in (value, *gradients))
