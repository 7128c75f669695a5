"""A layer against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models.hstu import HSTU, Options
from simgr_jax.models.item_sequence import encoder_config
from simgr_jax.models.transformer_config import TransformerConfig
from tests.training import tiny_run

WIDTH, HEADS, HEAD_WIDTH, LONGEST = 8, 2, 3, 5


@pytest.fixture(scope="module")
def shape() -> TransformerConfig:
    sizes = {"width": WIDTH, "heads": HEADS, "head_width": HEAD_WIDTH, "layers": 2, "max_positions": LONGEST}
    return dataclasses.replace(encoder_config(tiny_run.config(), Options()), **sizes, dropout=0.0)


@pytest.fixture(scope="module")
def hstu(shape) -> HSTU:
    """An encoder whose parameters are all random, so that each one counts."""
    encoder, rng = HSTU(shape, nnx.Rngs(0)), np.random.default_rng(0)
    state = nnx.state(encoder, nnx.Param)
    nnx.update(encoder, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), state))
    return encoder


def norm(x, parameters):
    x = x - x.mean(axis=-1, keepdims=True)
    scaled = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + parameters.epsilon)
    return scaled * np.asarray(parameters.scale) + np.asarray(parameters.bias)


def silu(x):
    return x / (1 + np.exp(-x))


def layer_of(layer, x):
    """[t, D] -> [t, D], for one sequence, position by position and head by head."""
    projected = silu(norm(x, layer.input_norm) @ np.asarray(layer.uvqk.kernel))
    gate, *by_head = np.split(projected, 4, axis=-1)
    value, query, key = (y.reshape(len(x), HEADS, HEAD_WIDTH) for y in by_head)
    bias, mixed = np.asarray(layer.distance_bias), np.zeros((len(x), HEADS, HEAD_WIDTH))
    for t in range(len(x)):
        for s in range(t + 1):
            for head in range(HEADS):
                score = query[t, head] @ key[s, head] + bias[t - s, head]
                mixed[t, head] += silu(score) / LONGEST * value[s, head]
    gated = norm(mixed.reshape(len(x), -1), layer.mixed_norm) * gate
    return x + gated @ np.asarray(layer.output.kernel) + np.asarray(layer.output.bias)


def test_follows_the_papers_equations_for_each_sequence_of_a_row(hstu):
    rng = np.random.default_rng(1)
    sequences = [rng.normal(size=(length, WIDTH)) for length in (4, 1, 5)]
    row = np.concatenate([*sequences, np.zeros((2, WIDTH))])[None]
    segment_ids = np.array([[1] * 4 + [2] + [3] * 5 + [0] * 2])
    positions = np.array([[*range(4), 0, *range(5), 0, 0]])
    states = jax.jit(hstu)(jnp.asarray(row, jnp.float32), segment_ids, positions)

    expected = [norm(layer_of(hstu.layers[1], layer_of(hstu.layers[0], x)), hstu.final_norm) for x in sequences]
    np.testing.assert_allclose(states[0, :10], np.concatenate(expected), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close(shape):
    row = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, WIDTH)), jnp.float32)
    ids, positions = np.ones((1, 5), np.int32), np.arange(5)[None]
    states, expected = (
        jax.jit(HSTU(dataclasses.replace(shape, dtype=dtype), nnx.Rngs(0)))(row, ids, positions)
        for dtype in ("bfloat16", "float32")
    )
    assert states.dtype == jnp.bfloat16
    assert 0 < jnp.max(jnp.abs(states.astype(jnp.float32) - expected)) < 0.05
