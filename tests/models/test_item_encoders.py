"""Every encoder against its plain formula, computed from gathered embeddings [M, L, D]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models import item_encoders
from simgr_jax.models.item_encoders import ITEM_ENCODERS

WIDTH, HEADS, HIDDEN, SIZES = 6, 2, 10, (3, 5, 4)
OFFSETS = np.cumsum((0, *SIZES[:-1]))
TOKENS = np.random.default_rng(0).integers(0, SIZES, size=(20, 3)) + OFFSETS
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(sum(SIZES), WIDTH)), jnp.float32)


def make(name, randomised=True):
    """An encoder whose parameters are all random, also those that begin as zeros or ones."""
    encoder = item_encoders.create(name, WIDTH, HEADS, HIDDEN, SIZES, nnx.Rngs(0))
    if randomised:
        generator = np.random.default_rng(2)
        nnx.update(
            encoder,
            jax.tree.map(
                lambda x: jnp.asarray(generator.normal(0.3, 0.6, x.shape), jnp.float32), nnx.state(encoder, nnx.Param)
            ),
        )
    return encoder


def _norm(x, norm):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon) * norm.scale[...]


def _attend(query, key, value):
    """Softmax attention of [M, Q, D] to keys and values [M, L, D], head by head."""
    outputs = []
    for columns in np.split(np.arange(WIDTH), HEADS):
        scores = jnp.einsum("mqd,mld->mql", query[..., columns], key[..., columns]) / np.sqrt(WIDTH // HEADS)
        outputs.append(jnp.einsum("mql,mld->mqd", jax.nn.softmax(scores, axis=-1), value[..., columns]))
    return jnp.concatenate(outputs, axis=-1)


def mean(encoder, e):
    return e.mean(axis=1)


def gated(encoder, e):
    m = e.mean(axis=1, keepdims=True)
    gates = jax.nn.sigmoid(
        e @ encoder.from_level.kernel[...] + encoder.from_level.bias[...] + m @ encoder.from_mean.kernel[...]
    )
    return (gates * e).mean(axis=1)


def attention(encoder, e):
    query, key, value = jnp.split(_norm(e, encoder.norm) @ encoder.qkv.kernel[...], 3, axis=-1)
    return (e + _attend(query, key, value) @ encoder.output.kernel[...]).mean(axis=1)


def cross_attention(encoder, e):
    m = e.mean(axis=1, keepdims=True)
    key, value = jnp.split(_norm(e, encoder.norm) @ encoder.key_value.kernel[...], 2, axis=-1)
    query = _norm(m, encoder.norm) @ encoder.query.kernel[...]
    return (m + _attend(query, key, value) @ encoder.output.kernel[...])[:, 0]


def mlp(encoder, e):
    concatenated = _norm(e, encoder.norm).reshape(len(e), -1)
    hidden = jax.nn.silu(concatenated @ encoder.input[...].reshape(-1, HIDDEN) + encoder.bias[...])
    return hidden @ encoder.output.kernel[...]


def mean_mlp(encoder, e):
    return mean(encoder, e) + mlp(encoder.mlp, e)


@pytest.mark.parametrize("formula", [mean, gated, attention, cross_attention, mlp, mean_mlp], ids=lambda f: f.__name__)
def test_values_and_gradients_equal_the_formula(formula):
    encoder = make(formula.__name__)
    graphdef, state = nnx.split(encoder)
    weights = np.random.default_rng(3).normal(size=(len(TOKENS), WIDTH)).astype(np.float32)

    def both(encode):
        def total(state, table):
            vectors = encode(nnx.merge(graphdef, state), table)
            return jnp.sum(vectors * weights), vectors

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(state, TABLE)

    ours = both(lambda encoder, table: encoder(table, jnp.asarray(TOKENS)))
    expected = both(lambda encoder, table: formula(encoder, table[TOKENS]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, expected)


def test_every_encoder_is_compared_with_a_formula():
    assert set(ITEM_ENCODERS) == {"mean", "gated", "attention", "cross_attention", "mlp", "mean_mlp"}


@pytest.mark.parametrize("name", ["mean", "gated", "attention", "cross_attention"])
def test_the_order_of_levels_does_not_matter(name):
    encoder = make(name)
    np.testing.assert_allclose(
        encoder(TABLE, jnp.asarray(TOKENS[:, [2, 0, 1]])), encoder(TABLE, jnp.asarray(TOKENS)), rtol=1e-4, atol=1e-5
    )


def test_mean_mlp_begins_as_the_mean():
    vectors = make("mean_mlp", randomised=False)(TABLE, jnp.asarray(TOKENS))
    np.testing.assert_allclose(vectors, TABLE[TOKENS].mean(axis=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ITEM_ENCODERS)
def test_only_the_mean_is_a_sum_over_levels(name):
    """v(a, b) - v(a', b) - v(a, b') + v(a', b') is zero for a sum over levels, and only then."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]) + OFFSETS
    v = np.asarray(make(name)(TABLE, jnp.asarray(corners)))
    mixed_difference = np.abs(v[0] - v[1] - v[2] + v[3]).max()
    if name == "mean":
        assert mixed_difference < 1e-6
    else:
        assert mixed_difference > 1e-2


@pytest.mark.parametrize("name", ["mean", "mlp", "mean_mlp"])
def test_no_array_of_all_items_and_levels_is_made(name):
    """With many items the gathered [N, L, D] embeddings would be the largest array of a step."""
    encoder = make(name)
    items = np.tile(TOKENS, (5, 1))
    closed = jax.make_jaxpr(jax.grad(lambda table: encoder(table, jnp.asarray(items)).sum()))(TABLE)
    largest = max(variable.aval.size for equation in closed.eqns for variable in equation.outvars)
    assert largest <= len(items) * max(WIDTH, HIDDEN)


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="no item encoder 'rnn'"):
        item_encoders.create("rnn", WIDTH, HEADS, HIDDEN, SIZES, nnx.Rngs(0))
