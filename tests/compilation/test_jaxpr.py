from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from simgr_jax.compilation.jaxpr import matmul_flops

ROWS, WIDTH, INNER = 6, 4, 10


def traced(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments))


def test_gradients_of_frozen_weights_are_not_counted():
    x, frozen, adapter = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, INNER)), jnp.ones((INNER, WIDTH))

    def loss(adapter):
        return jnp.sum((jnp.tanh(x @ frozen) @ adapter) ** 2)

    product = 2 * ROWS * WIDTH * INNER
    # Nothing before the adapter is learned, so the backward pass has only one product.
    assert traced(jax.grad(loss), adapter) == 3 * product


def test_requested_recomputation_is_counted():
    x, weights = jnp.ones((ROWS, WIDTH)), jnp.ones((3, WIDTH, WIDTH))

    def loss(weights, policy):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(jnp.tanh(x @ w) @ w), None), policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    product = 2 * ROWS * WIDTH * WIDTH
    policies = jax.checkpoint_policies
    assert traced(jax.grad(lambda w: loss(w, policies.everything_saveable)), weights) == 3 * 6 * product
    assert traced(jax.grad(lambda w: loss(w, policies.nothing_saveable)), weights) == 3 * 8 * product


def test_a_mixture_of_experts_counts_its_rows_once():
    x, experts, sizes = jnp.ones((ROWS, WIDTH)), jnp.ones((3, WIDTH, INNER)), jnp.array([1, 2, 3])
    product = 2 * ROWS * WIDTH * INNER
    assert traced(jax.lax.ragged_dot, x, experts, sizes) == product
    gradient = jax.grad(lambda x, experts: jnp.sum(jax.lax.ragged_dot(x, experts, sizes) ** 2), (0, 1))
    assert traced(gradient, x, experts) == 3 * product


def test_a_conditional_counts_its_most_expensive_branch():
    x = jnp.ones((ROWS, ROWS))
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert traced(lambda i, x: jax.lax.switch(i, branches, x), 1, x) == 2 * 2 * ROWS**3


def test_per_device_computations_are_refused():
    mesh = jax.make_mesh((1,), ("only",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("only")
    with pytest.raises(ValueError, match="without a mesh"):
        traced(jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones((4, 4)))
