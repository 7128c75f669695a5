"""The recurrence against PyTorch's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models.gru4rec import Options, StackedGRU
from simgr_jax.models.item_sequence import encoder_config
from tests.training import tiny_run

WIDTH, LAYERS, LENGTHS = 6, 2, (5, 1, 3)
DTYPES = ("bfloat16", "float32")


@pytest.fixture(scope="module")
def shape():
    return dataclasses.replace(encoder_config(tiny_run.config(), Options()), width=WIDTH, layers=LAYERS, dropout=0.0)


@pytest.fixture(scope="module")
def gru(shape) -> StackedGRU:
    """Its biases are not zero."""
    gru, rng = StackedGRU(shape, nnx.Rngs(0)), np.random.default_rng(0)
    for layer in gru.layers:
        for bias in (layer.input.bias, layer.recurrent_bias):
            bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
    return gru


def packed(sequences: list[np.ndarray], room: int) -> tuple[np.ndarray, ...]:
    """One row: embeddings [1, room, D], segment ids and positions [1, room]."""
    lengths = [len(sequence) for sequence in sequences]
    embeddings = np.zeros((1, room, WIDTH), np.float32)
    segment_ids, positions = np.zeros((1, room), np.int32), np.zeros((1, room), np.int32)
    embeddings[0, : sum(lengths)] = np.concatenate(sequences)
    segment_ids[0, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    positions[0, : sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    return embeddings, segment_ids, positions


def test_equals_pytorchs_and_forgets_between_sequences(gru):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.GRU(WIDTH, WIDTH, LAYERS, batch_first=True)
    for number, layer in enumerate(gru.layers):
        for name, ours in (
            ("weight_ih", layer.input.kernel[...].T),
            ("weight_hh", layer.recurrent_kernel[...].T),
            ("bias_ih", layer.input.bias[...]),
            ("bias_hh", layer.recurrent_bias[...]),
        ):
            getattr(theirs, f"{name}_l{number}").data = torch.tensor(np.asarray(ours))

    rng = np.random.default_rng(1)
    sequences = [rng.normal(size=(length, WIDTH)).astype(np.float32) for length in LENGTHS]
    states = gru(*packed(sequences, sum(LENGTHS) + 2))[0, : sum(LENGTHS)]
    with torch.no_grad():
        expected = np.concatenate([theirs(torch.tensor(sequence[None]))[0][0] for sequence in sequences])
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_before_each_layer(shape):
    gru = StackedGRU(dataclasses.replace(shape, dropout=0.999), nnx.Rngs(0))
    row = packed([np.ones((4, WIDTH), np.float32)], 4)
    dropped = gru(*row, rngs=nnx.Rngs(dropout=1))
    # No input gets through, and the biases are zero, so the state stays at tanh(0).
    np.testing.assert_array_equal(dropped, np.zeros_like(dropped))
    assert (np.abs(gru(*row)) > 0).all()


def test_only_products_are_computed_in_bfloat16(shape):
    row = packed([np.random.default_rng(2).normal(size=(8, WIDTH)).astype(np.float32)], 8)
    states, expected = (StackedGRU(dataclasses.replace(shape, dtype=dtype), nnx.Rngs(0))(*row) for dtype in DTYPES)
    assert states.dtype == jnp.float32
    assert 0 < jnp.max(jnp.abs(states - expected)) < 0.03


def test_learns_through_time(gru):
    """The last state's gradient reaches every item of its own sequence, and none of the sequence before."""
    rng = np.random.default_rng(3)
    row, segment_ids, positions = packed([rng.normal(size=(length, WIDTH)) for length in (3, 4)], 7)
    gradient = jax.jit(jax.grad(lambda row: gru(row, segment_ids, positions)[0, -1].sum()))(jnp.asarray(row))[0]
    assert (gradient[:3] == 0).all()
    assert (gradient[3:] != 0).any(axis=1).all()
