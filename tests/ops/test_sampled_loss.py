"""Compares the sampled loss with the full-catalog loss, and each sampler's frequencies with its stated ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgr_jax.ops.sampled_loss import (
    Negatives,
    cumulative_weights,
    popularity_negatives,
    sampled_cross_entropy,
    uniform_negatives,
)
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy

B, N, D, M = 6, 40, 5, 16
TEMPERATURE = 2.0
TARGETS = np.array([3, 8, 3, 0, 39, 21])
COUNTS = np.random.default_rng(3).geometric(0.1, N) - 1
SAMPLERS = {
    "uniform": lambda key, count: uniform_negatives(key, N, count),
    "popularity": lambda key, count: popularity_negatives(key, jnp.asarray(cumulative_weights(COUNTS)), count),
}
PROBABILITIES = {"uniform": np.full(N, 1 / N), "popularity": (COUNTS + 1) / (COUNTS + 1).sum()}


@pytest.fixture(scope="module")
def vectors():
    """(users [B, D], items [N, D])"""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, D), (N, D)))


def sampled(users, items, temperature, negatives, smoothing):
    return sampled_cross_entropy(
        users, items[TARGETS], TARGETS, negatives, items[negatives.items], N, temperature, smoothing
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_drawing_every_item_once_gives_the_full_catalog_loss(vectors, smoothing):
    negatives = Negatives(jnp.arange(N), jnp.zeros(N))
    weights = jnp.arange(1.0, B + 1)

    def total(loss):
        return jax.value_and_grad(lambda *arguments: loss(*arguments) @ weights, (0, 1, 2))(*vectors, TEMPERATURE)

    found = total(lambda *arguments: sampled(*arguments, negatives, smoothing))
    expected = total(lambda users, items, t: full_catalog_cross_entropy(users, items, TARGETS, t, smoothing))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_normaliser_and_the_mean_logit_are_unbiased(vectors, sampler):
    """The mean estimate over many draws is within 4 standard errors, which are less than 2%."""
    users, items = vectors
    draws = 4000

    def estimates(key):
        negatives = SAMPLERS[sampler](key, M)
        plain, smoothed = (sampled(users, items, TEMPERATURE, negatives, smoothing) for smoothing in (0.0, 0.5))
        target_logits = jnp.sum(users * items[TARGETS], axis=-1) / TEMPERATURE
        return jnp.exp(plain + target_logits), target_logits - 2 * (smoothed - plain)

    found = jax.jit(jax.vmap(estimates))(jax.random.split(jax.random.key(0), draws))
    logits = users @ items.T / TEMPERATURE
    scales = [np.exp(logits).sum(axis=1), np.abs(logits).mean(axis=1)]
    for estimate, expected, scale in zip(found, [scales[0], logits.mean(axis=1)], scales, strict=True):
        standard_error = np.std(estimate, axis=0) / np.sqrt(draws)
        assert (standard_error < 0.02 * scale).all()
        assert (np.abs(np.mean(estimate, axis=0) - expected) < 4 * standard_error).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_items_are_drawn_as_often_as_their_expected_counts_say(sampler):
    count = 200_000
    negatives = SAMPLERS[sampler](jax.random.key(1), count)
    expected = count * PROBABILITIES[sampler]
    np.testing.assert_allclose(np.exp(negatives.log_expected_counts), expected[negatives.items], rtol=1e-5)
    frequencies = np.bincount(negatives.items, minlength=N)
    assert (np.abs(frequencies - expected) < 4 * np.sqrt(expected)).all()


def test_weights_are_exact_beyond_float32_precision():
    counts = np.array([2**30, 0, 1, 0, 2**29, 4])
    np.testing.assert_array_equal(np.diff(cumulative_weights(counts), prepend=0), counts + 1)


def test_weights_too_large_for_int32_keep_their_proportions_and_lose_no_item():
    counts = np.array([2**40, 0, 2**39, 2**38])
    cumulative = cumulative_weights(counts)
    weights = np.diff(cumulative.astype(np.int64), prepend=0)
    assert cumulative.dtype == np.int32
    assert weights[1] == 1
    np.testing.assert_allclose(weights[[0, 2, 3]] / weights[3], [4, 2, 1], rtol=1e-6)
    # Expected counts follow from the scaled weights.
    negatives = popularity_negatives(jax.random.key(0), jnp.asarray(cumulative), 1000)
    np.testing.assert_allclose(
        np.exp(negatives.log_expected_counts), 1000 * weights[negatives.items] / weights.sum(), rtol=1e-5
    )


def test_a_row_is_not_pushed_away_from_its_own_target(vectors):
    users, items = vectors
    hits = Negatives(jnp.full(M, TARGETS[0]), jnp.zeros(M))
    loss, gradient = jax.value_and_grad(lambda users: sampled(users, items, TEMPERATURE, hits, 0.0)[0])(users)
    assert loss == 0
    assert not gradient.any()
    # For the other rows, that item is an ordinary negative.
    assert (sampled(users, items, TEMPERATURE, hits, 0.0)[jnp.asarray(TARGETS[0] != TARGETS)] > 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_gradients_are_finite_for_any_logits(vectors, scale):
    users, items = vectors
    negatives = SAMPLERS["popularity"](jax.random.key(2), M)
    gradients = jax.grad(lambda *v: sampled(*v, negatives, 0.1).sum(), (0, 1, 2))(users * scale, items, TEMPERATURE)
    assert all(np.isfinite(x).all() for x in gradients)
