"""Compares losses over a catalog split across 8 devices with one device's, and streamed losses with dense ones.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.ops.sharded_loss ENCODER,ENCODER 2 2 2

A separate program that `test_streamed_loss.py` runs; it fails if a loss or a gradient differs.
"""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simgr_jax.devices import sharding
from simgr_jax.ops.sampled_loss import cumulative_weights, popularity_negatives, sampled_cross_entropy
from simgr_jax.ops.similarity_loss import SIMILARITIES
from tests.ops.test_streamed_loss import (
    SMOOTHINGS,
    TARGETS,
    B,
    D,
    N,
    assert_trees_close,
    dense,
    make_tokens,
    problem,
    streamed,
    with_gradients,
)

# With 8 parts, the sixth has one row of padding and the last two are all padding.
PADDED = 32


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The mesh, or one device if `mesh` is None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check(mesh: Mesh, encoder_name: str, chunk: int) -> None:
    """Compares all similarities and smoothings with the dense loss."""
    encode, learned = problem(encoder_name)
    tokens = make_tokens(N)
    padded = np.pad(tokens, ((0, PADDED - N), (0, 0)))
    settings = list(product(SIMILARITIES, SMOOTHINGS))
    # Made once, outside the mesh: inside it they would be placed differently and cause recompilation.
    learned = {similarity: learned(similarity) for similarity in SIMILARITIES}
    dense_losses = with_gradients(partial(dense, encode, TARGETS))
    expected = [dense_losses(learned[similarity], tokens, smoothing) for similarity, smoothing in settings]
    for place in (None, mesh):
        with within(place):
            losses = with_gradients(partial(streamed, encode, chunk, TARGETS))
            for setting, (wanted_gradients, wanted) in zip(settings, expected, strict=True):
                similarity, smoothing = setting
                gradients, found = losses(learned[similarity], padded, smoothing)
                case = f"{encoder_name} {chunk} {place} {setting}"
                np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=case)
                assert_trees_close(gradients, wanted_gradients, case)


def check_sampled(mesh: Mesh) -> None:
    """Compares draws, losses and gradients of the sampled loss, with arrays sharded as in SimGR."""
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(length, D)).astype(np.float32) for length in (B, PADDED))
    cumulative = jnp.asarray(cumulative_weights(rng.integers(0, 9, N)))

    def losses(users, items):
        users, items = sharding.constrain(users, "batch", None), sharding.constrain(items, "items", None)
        negatives = popularity_negatives(jax.random.key(1), cumulative, 7)
        vectors = items[TARGETS], items[negatives.items]
        found = sampled_cross_entropy(users, vectors[0], TARGETS, negatives, vectors[1], N, 0.5, 0.1)
        return found.sum(), (found, negatives)

    results = []
    for place in (None, mesh):
        with within(place):
            results.append(jax.jit(jax.grad(losses, (0, 1), has_aux=True))(users, items))
    expected, found = results
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def main(encoders: str, *mesh: str) -> None:
    """
    Args:
      encoders: names of item encoders, with commas between them.
      mesh: the sizes of its axes.
    """
    assert jax.device_count() == 8
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, map(int, mesh), strict=True)))
    # No part's length is a multiple of the chunk.
    cases = [*product(encoders.split(","), [3]), ("mean", 0)]
    with ThreadPoolExecutor(2) as threads:  # Most of the time is compilation.
        list(threads.map(partial(check, mesh), *zip(*cases, strict=True)))
    check_sampled(mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
