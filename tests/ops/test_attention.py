import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from simgr_jax.ops import attention as attention_module
from simgr_jax.ops.attention import causal_segment_mask

attention = functools.partial(attention_module.attention, scale=0.5)


def reference(query, key, value, segment_ids, window=0, softcap=0.0):
    """Float64, one query at a time; query head h uses key head h // (H / Hkv)."""
    output = np.zeros_like(query)
    rows, length, heads, width = query.shape
    for row, t, head in np.ndindex(rows, length, heads):
        first = max(0, t - window + 1) if window else 0
        seen = [s for s in range(first, t + 1) if segment_ids[row, s] == segment_ids[row, t]]
        group = head // (heads // key.shape[2])
        scores = key[row, seen, group] @ query[row, t, head] / np.sqrt(width)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
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


def test_an_all_padding_row_has_finite_values_and_gradients():
    arrays = [jnp.asarray(x, jnp.float32) for x in qkv(2, 2)]
    total = lambda query, key, value: attention(query, key, value, jnp.zeros((2, 7), jnp.int32)).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)
    assert all(np.isfinite(x).all() for x in (value, *gradients))


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_windows_and_softcap_equal_numpy(window, softcap):
    arrays = qkv(4, 2)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays]
    output = attention(*inputs, jnp.asarray(SEGMENT_IDS), windows=(5, window), window_index=1, softcap=softcap)
    np.testing.assert_allclose(output, reference(*arrays, SEGMENT_IDS, window, softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_the_tpu_kernel_equals_xla(softcap, monkeypatch):
    """Values and gradients of packed rows, in Pallas's interpreter."""
    make = splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", functools.partial(make, interpret=True))
    generator = np.random.default_rng(0)
    length = 256
    inputs = [jnp.asarray(generator.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
    segment_ids = jnp.asarray(np.sort(generator.integers(1, 5, (2, length)), axis=1))
    weights = jnp.asarray(generator.normal(size=(2, length, 4, 8)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def weighted(implementation, index, *inputs):
        output = lambda *inputs: attention(  # noqa: E731
            *inputs,
            segment_ids,
            windows=(0, 40),
            window_index=index,
            softcap=softcap,
            implementation=implementation,
        )
        value, pullback = jax.vjp(output, *inputs)
        return value, pullback(weights)

    for index in (0, 1):
        expected = weighted("xla", index, *inputs)
        actual = weighted("splash", index, *inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_each_branch_attends_to_the_history_and_to_itself(window, softcap):
    """Equals attention over each branch as its own sequence; [B, W, S] = [2, 3, 2] new positions after one old one."""
    generator = np.random.default_rng(0)
    lengths, length, old, new = (5, 2), 5, 1, 2
    history = [generator.normal(size=(2, length, 2, 4)) for _ in range(2)]
    query, key, value = (generator.normal(size=(2, 3, n, h, 4)) for n, h in ((new, 4), (old + new, 2), (old + new, 2)))
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, *history, key, value)]
    arrays.insert(3, jnp.array(lengths))
    output = attention_module.branch_attention(*arrays, scale=0.5, windows=(9, window), window_index=1, softcap=softcap)
    for row, branch in np.ndindex(2, 3):
        keys, values = (
            np.concatenate([past[row, : lengths[row]], mine[row, branch]])[None]
            for past, mine in zip(history, (key, value), strict=True)
        )
        queries = np.zeros((1, keys.shape[1], 4, 4))
        queries[0, -new:] = query[row, branch]
        expected = reference(queries, keys, values, np.ones(keys.shape[:2]), window, softcap)[0, -new:]
        np.testing.assert_allclose(output[row, branch], expected, rtol=1e-5, atol=1e-6)


def test_the_history_is_not_copied_for_each_branch():
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    history, branch = shape(4, 64, 2, 64), shape(4, 16, 1, 2, 64)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    branch_attention = jax.jit(functools.partial(attention_module.branch_attention, scale=1.0))
    compiled = branch_attention.lower(branch, history, history, lengths, branch, branch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * history.size * 4
