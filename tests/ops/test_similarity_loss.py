"""Compares the losses and their gradients with float64 NumPy code written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, in_batch_cross_entropy, to_similarity_space

B, N, D = 7, 23, 5
TEMPERATURES = [0.07, 1.0]
SMOOTHINGS = [0.0, 0.1]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(B, D)), rng.normal(size=(N, D))
    targets = np.array([3, 8, 3, 0, 22, 8, 3])  # repeats
    return users, items, targets


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def unit_gradient(x, upstream):
    """The gradient through x / |x|."""
    y, norm = unit(x), np.linalg.norm(x, axis=-1, keepdims=True)
    return (upstream - y * np.sum(upstream * y, axis=-1, keepdims=True)) / norm


def reference_full_catalog(users, items, targets, temperature, smoothing):
    """Mean loss and its gradients with respect to users, items and temperature."""
    logits = users @ items.T / temperature
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    wanted = np.full((B, N), smoothing / N)
    wanted[np.arange(B), targets] += 1 - smoothing
    loss = -(wanted * np.log(probabilities)).sum(1).mean()
    d_logits = (probabilities - wanted) / B
    return (
        loss,
        d_logits @ items / temperature,
        d_logits.T @ users / temperature,
        -(d_logits * logits).sum() / temperature,
    )


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_full_catalog_loss_and_gradients_equal_the_float64_reference(arrays, similarity, temperature, smoothing):
    users, items, targets = arrays

    def loss_of(users, items, temperature):
        users, items = to_similarity_space(users, similarity), to_similarity_space(items, similarity)
        return full_catalog_cross_entropy(users, items, jnp.asarray(targets), temperature, smoothing).mean()

    loss, gradients = jax.jit(jax.value_and_grad(loss_of, (0, 1, 2)))(
        jnp.float32(users), jnp.float32(items), jnp.float32(temperature)
    )
    if similarity == "dot":
        expected, d_users, d_items, d_temperature = reference_full_catalog(
            users, items, targets, temperature, smoothing
        )
    else:
        expected, d_users, d_items, d_temperature = reference_full_catalog(
            unit(users), unit(items), targets, temperature, smoothing
        )
        d_users, d_items = unit_gradient(users, d_users), unit_gradient(items, d_items)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for actual, wanted in zip(gradients, (d_users, d_items, d_temperature), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def reference_in_batch(users, vectors, targets, valid, temperature, log_q, smoothing):
    losses = np.zeros(B)
    for i in range(B):
        candidates = [j for j in range(B) if j == i or (targets[j] != targets[i] and valid[j])]
        logits = np.array(
            [users[i] @ vectors[j] / temperature - (0 if log_q is None else log_q[j]) for j in candidates]
        )
        log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        wanted = np.full(len(candidates), smoothing / len(candidates))
        wanted[candidates.index(i)] += 1 - smoothing
        losses[i] = -(wanted * log_p).sum()
    return losses


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("with_log_q", [False, True])
def test_in_batch_loss_and_gradients_equal_the_float64_reference(arrays, with_log_q, smoothing):
    users, items, targets = arrays
    vectors = items[targets]
    valid = np.array([1, 1, 1, 1, 0, 1, 1])
    log_q = np.log(np.random.default_rng(1).dirichlet(np.ones(N)))[targets] if with_log_q else None
    weights = valid / valid.sum()

    def loss_of(users, vectors):
        losses = in_batch_cross_entropy(
            users,
            vectors,
            jnp.asarray(targets),
            jnp.asarray(valid, bool),
            0.5,
            None if log_q is None else jnp.float32(log_q),
            smoothing,
        )
        return (losses * weights).sum()

    def expected(users, vectors):
        return (reference_in_batch(users, vectors, targets, valid, 0.5, log_q, smoothing) * weights).sum()

    loss, (d_users, d_vectors) = jax.value_and_grad(loss_of, (0, 1))(jnp.float32(users), jnp.float32(vectors))
    np.testing.assert_allclose(loss, expected(users, vectors), rtol=2e-6)
    np.testing.assert_allclose(d_users, central_differences(lambda x: expected(x, vectors), users), atol=2e-5)
    np.testing.assert_allclose(d_vectors, central_differences(lambda x: expected(users, x), vectors), atol=2e-5)


def central_differences(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


def test_in_batch_loss_with_exact_log_q_estimates_the_full_catalog_loss():
    """With negatives drawn from q, the mean of exp(logit - log q) is the full normaliser."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(N) * 0.5)
    items, user = rng.normal(size=(N, D)), rng.normal(size=D)
    batch = 4096
    targets = rng.choice(N, size=batch, p=q)
    users = np.tile(user, (batch, 1))
    # Candidates are all rows with another target, so the estimated normaliser has no repeats of the target.
    losses = in_batch_cross_entropy(
        jnp.float32(users),
        jnp.float32(items[targets]),
        jnp.asarray(targets),
        jnp.ones(batch, bool),
        1.0,
        jnp.float32(np.log(q * batch)[targets]),
    )
    scores = np.exp(items @ user)
    for target in np.unique(targets)[:5]:
        # The target itself enters once, divided by its expected count.
        own = scores[target] / (q[target] * batch)
        expected = -np.log(own / (own + scores.sum() - scores[target]))
        np.testing.assert_allclose(losses[np.flatnonzero(targets == target)[0]], expected, rtol=0.05)


def test_a_padded_row_changes_no_other_rows_loss(arrays):
    users, items, targets = arrays
    vectors = items[targets]
    whole = in_batch_cross_entropy(
        jnp.float32(users[:-1]), jnp.float32(vectors[:-1]), jnp.asarray(targets[:-1]), jnp.ones(B - 1, bool), 0.1
    )
    padded = in_batch_cross_entropy(
        jnp.float32(users), jnp.float32(vectors), jnp.asarray(targets), jnp.ones(B, bool).at[-1].set(False), 0.1
    )
    np.testing.assert_allclose(padded[:-1], whole, rtol=1e-6)


def test_cosine_of_a_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda x: to_similarity_space(x, "cosine").sum())(jnp.zeros((1, D)))
    assert np.isfinite(gradient).all()
