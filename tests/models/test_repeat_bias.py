"""The bias for items that a history has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.models.repeat_bias import SPEED, RepeatBias, newest_in_history
from tests.models.conftest import NUM_ITEMS
from tests.models.test_simgr import ROWS, batch_of, packed, ranking_of

BIAS = -0.6
TEMPERATURE = 0.2


def with_bias(model, value=BIAS):
    model.repeat_bias.scaled[...] = jnp.float32(value / SPEED)
    return model


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=12, max_size=12))
def test_each_item_of_a_history_counts_once(read):
    items, starts = (np.array(part)[None] for part in zip(*read, strict=True))
    starts[0, 0] = True
    found = np.asarray(newest_in_history(jnp.asarray(items), jnp.asarray(starts)))[0]
    for place in range(12):
        begin = np.flatnonzero(starts[0, : place + 1])[-1]
        counted = np.flatnonzero(found[place])
        assert ((counted >= begin) & (counted <= place)).all()
        assert sorted(items[0, counted]) == sorted(set(items[0, begin : place + 1]))


def readouts_alone(read, targets, starts):
    """A batch of rows in which a readout follows each item."""
    places = np.broadcast_to(np.arange(read.shape[1]), read.shape)
    return TrainBatch(read, np.cumsum(starts, axis=1), places, places, read, targets, np.ones(read.shape, bool))


def logits(model, histories):
    """float64 [H, N], of the model's scores before the bias, and whether each item is in each history."""
    batch = batch_of(model, histories, [0] * len(histories))
    users = np.asarray(model.user_vectors(batch, model.catalog()), np.float64)[: len(histories)]
    has = np.array([[item in history for item in range(NUM_ITEMS)] for history in histories])
    return users @ np.asarray(model.item_vectors(model.catalog()), np.float64).T, has


@pytest.mark.parametrize(("chunk", "bias"), [(0, BIAS), (5, 0.9)])
def test_the_full_catalog_loss_is_that_of_the_biased_scores(make_simgr, chunk, bias):
    """Against float64 over the dense scores; with a popularity prior, and items that are read twice."""
    model = with_bias(make_simgr(repeat_bias=True, popularity_prior=0.3, catalog_chunk=chunk), bias)
    found, _ = jax.jit(lambda model, batch: model.loss(batch, nnx.Rngs(dropout=0)))(model, packed(model))
    prefixes = [user[:end] for users in ROWS for user in users for end in range(1, len(user))]
    targets = [user[end] for users in ROWS for user in users for end in range(1, len(user))]
    losses = []
    counts = np.arange(NUM_ITEMS) + 1
    for first in range(0, len(prefixes), 12):
        scores, has = logits(model, prefixes[first : first + 12])
        values = (scores + bias * has) / TEMPERATURE + 0.3 * np.log(counts / counts.sum())
        chosen = targets[first : first + 12]
        losses.extend(np.log(np.exp(values).sum(axis=1)) - values[np.arange(len(chosen)), chosen])
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_its_gradient_is_that_of_the_dense_loss():
    """Against autodiff through all logits."""
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(2, 5, 4)), rng.normal(size=(9, 4))
    read, targets = rng.integers(0, 9, (2, 5)), rng.integers(0, 9, (2, 5))
    starts = np.zeros((2, 5), bool)
    starts[:, 0] = starts[1, 3] = True
    mask = newest_in_history(jnp.asarray(read), jnp.asarray(starts))
    has = np.zeros((2, 5, 9), bool)
    for row, place, other in zip(*np.nonzero(mask), strict=True):
        has[row, place, read[row, other]] = True

    def dense(bias, users, items):
        values = (users @ items.T + bias * has) / 0.5
        return jnp.mean(jax.nn.logsumexp(values, axis=-1) - jnp.take_along_axis(values, targets[..., None], -1)[..., 0])

    def sparse(bias, users, items):
        layer = RepeatBias()
        layer.scaled[...] = bias / SPEED
        states = users.reshape(-1, 4)
        of_targets, of_read = items[targets.reshape(-1)], items[read.reshape(-1)]
        values = states @ items.T / 0.5
        losses = jax.nn.logsumexp(values, axis=-1) - jnp.sum(states * of_targets, axis=-1) / 0.5
        batch = readouts_alone(read, targets, starts)
        return jnp.mean(layer.in_cross_entropy(losses, batch, states, of_targets, of_read, jnp.float32(0.5)))

    arguments = tuple(map(jnp.float32, (BIAS, users, items)))
    (wanted, expected), (value, found) = (jax.value_and_grad(f, (0, 1, 2))(*arguments) for f in (dense, sparse))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_a_history_with_all_of_the_probability_gives_finite_losses_and_gradients():
    layer = RepeatBias()
    layer.scaled[...] = jnp.float32(-50 / SPEED)
    batch = readouts_alone(np.array([[3]]), np.array([[4]]), np.array([[True]]))

    def loss(read_vectors):
        one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        return jnp.sum(layer.in_cross_entropy(jnp.full(1, 40.0), batch, one, zero, read_vectors, 1.0))

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), 40.0))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_ranking_adds_it_once_for_each_item_of_the_whole_history(make_simgr):
    model = with_bias(make_simgr(repeat_bias=True))
    histories = [[3], [1, 4, 1], [9, 2, 6, 5, 30]]
    scores, has = logits(model, histories)
    scores += BIAS * has
    ranking = ranking_of(model, histories, [4, 1, 7])
    np.testing.assert_allclose(ranking.scores, -np.sort(-scores, axis=1)[:, : ranking.scores.shape[1]], rtol=1e-5)
    batch = batch_of(model, histories, [0, 0, 0])
    found = np.asarray(model.log_probabilities(batch, model.catalog()))[:3]
    np.testing.assert_allclose(found, jax.nn.log_softmax(scores / TEMPERATURE), atol=1e-4)
