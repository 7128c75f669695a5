"""The texts' similarity as a part of SimGR's score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models.text_similarity import TextSimilarity
from tests.models.conftest import NUM_ITEMS
from tests.models.test_simgr import batch_of, packed

READINGS = np.random.default_rng(5).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
READINGS /= np.linalg.norm(READINGS, axis=1, keepdims=True)
HISTORIES = [[3], [1, 4, 1], [9, 2, 6, 5, 30]]


HISTORY_MAP, ITEM_MAP = np.random.default_rng(6).normal(0, 0.3, size=(2, 6, 6))


def user_part(history, decay, weight):
    """float64 [X], from a history's items, oldest first."""
    total = sum(decay**age * READINGS[item].astype(np.float64) for age, item in enumerate(reversed(history)))
    total += total @ HISTORY_MAP
    return weight * total / np.linalg.norm(total)


def item_part():
    """float64 [N, X]."""
    mapped = READINGS + READINGS @ ITEM_MAP
    return mapped / np.linalg.norm(mapped, axis=1, keepdims=True)


def set_to(layer, weight, decay_logit=0.0):
    layer.weight[...], layer.decay_logit[...] = jnp.float32(weight), jnp.float32(decay_logit)
    layer.history_map[...], layer.item_map[...] = jnp.float32(HISTORY_MAP), jnp.float32(ITEM_MAP)


def test_a_history_is_the_decayed_sum_of_its_readings_in_training_and_at_its_end():
    layer = TextSimilarity(width=6, dropout=0.5)
    set_to(layer, 1.7, -0.4)
    decay = 1 / (1 + np.exp(0.4))
    items = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    starts = np.array([[True, False, False, True, False], [True, False, False, True, True]])
    found = layer.of_users(jnp.asarray(READINGS)[items], starts)
    histories = {(0, 2): [3, 1, 4], (0, 4): [1, 5], (1, 0): [9], (1, 2): [9, 2, 6]}
    for place, history in histories.items():
        np.testing.assert_allclose(found[place], user_part(history, decay, 1.7), rtol=1e-5, atol=1e-6)
    ends = layer.at_end(jnp.asarray(READINGS), np.array([[3, 1, 4, -1], [1, 5, -1, -1], [9, 2, 6, 0]]))
    for end, history in zip(ends, ([3, 1, 4], [1, 5], [9, 2, 6, 0]), strict=True):
        np.testing.assert_allclose(end, user_part(history, decay, 1.7), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.of_items(jnp.asarray(READINGS)), item_part(), rtol=1e-5, atol=1e-6)


def test_it_begins_as_the_similarity_of_texts_and_dropout_hides_parts_of_the_history_in_training():
    layer = TextSimilarity(width=6, dropout=0.5)
    np.testing.assert_allclose(layer.of_items(jnp.asarray(READINGS)), READINGS, rtol=1e-5)
    items, starts = np.tile(np.arange(20), (9, 1)), np.ones((9, 20), bool)
    np.testing.assert_allclose(
        layer.of_users(jnp.asarray(READINGS)[items], starts), READINGS[items], rtol=1e-5, atol=1e-7
    )
    hidden = np.asarray(layer.of_users(jnp.asarray(READINGS)[items], starts, nnx.Rngs(dropout=0))) == 0
    assert abs(hidden.mean() - 0.5) < 0.06


@pytest.mark.parametrize("history", ["item", "tokens"])
def test_it_is_added_to_the_score(make_simgr, history):
    """With and without, all else equal."""
    model = make_simgr(history=history, item_text="read", readings=READINGS)
    batch = batch_of(model, HISTORIES, [0] * len(HISTORIES))
    score = jax.jit(lambda model: model.log_probabilities(batch, model.catalog())[: len(HISTORIES)])
    wanted = np.stack([user_part(one, 0.5, 2.0) for one in HISTORIES]) @ item_part().T / 0.2
    set_to(model.text_similarity, 0)
    without = np.asarray(score(model), np.float64)
    model.text_similarity.weight[...] = jnp.float32(2)
    found = np.asarray(score(model), np.float64)
    center = lambda scores: scores - scores.mean(axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(center(found - without), center(wanted), atol=1e-3)


def test_a_text_tells_items_with_equal_codes_apart_and_equal_texts_do_not(make_simgr, codes):
    shared, readings = codes.copy(), READINGS.copy()
    shared[[4, 9]] = shared[1]
    assert make_simgr(codes=shared).has_collisions
    assert not make_simgr(codes=shared, item_text="read", readings=readings).has_collisions
    readings[9] = readings[1]
    model = make_simgr(codes=shared, item_text="read", readings=readings)
    assert model.first_twin()[9] == 1 and model.first_twin()[4] == 4


def test_the_popularity_prior_is_in_the_training_logits_alone(make_simgr):
    """Against the plain loss, whose logits get the prior by hand."""
    found = {}
    for prior in (0.0, 0.7):
        model = make_simgr(popularity_prior=prior)
        batch = packed(model)
        found[prior], _ = jax.jit(lambda model, batch: model.loss(batch, nnx.Rngs(dropout=0)))(model, batch)
        ranking = batch_of(model, HISTORIES, [0] * len(HISTORIES))
        found[prior, "ranks"] = model.log_probabilities(ranking, model.catalog())
    np.testing.assert_array_equal(found[0.7, "ranks"], found[0.0, "ranks"])

    vectors = np.asarray(model.item_vectors(model.catalog()), np.float64)
    states = model.user_states(batch.inputs, batch.segment_ids, batch.positions, None)
    states = np.asarray(batch.at_readouts(states), np.float64)[batch.valid]
    logits = states / np.linalg.norm(states, axis=1, keepdims=True) @ vectors.T / 0.2
    counts = np.arange(NUM_ITEMS) + 1
    logits += 0.7 * np.log(counts / counts.sum())
    targets = batch.targets[batch.valid]
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]
    np.testing.assert_allclose(found[0.7], expected.mean(), rtol=1e-5)
    assert abs(found[0.7] - found[0.0]) > 0.01
