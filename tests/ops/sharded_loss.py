"""The losses over a catalog that 8 devices split, against the dense loss on one, and streamed against dense there.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.ops.sharded_loss

A program of its own, run by `test_streamed_loss.py`; fails where a loss or a gradient differs.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from simgr_jax import sharding
from simgr_jax.models.item_encoders import ITEM_ENCODERS
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

MESHES = (None, (8, 1, 1), (1, 8, 1), (2, 2, 2))
# Of 8 parts the sixth has one row of padding and the last two nothing but padding.
PADDED = 32


def within(sizes: tuple[int, int, int] | None) -> contextlib.AbstractContextManager:
    """A mesh of these sizes, or one device."""
    if sizes is None:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True))))


def check(encoder_name: str, chunk: int) -> None:
    """Compares all meshes, similarities and smoothings with the dense loss."""
    encode, learned = problem(encoder_name)
    tokens = make_tokens(N)
    padded = np.pad(tokens, ((0, PADDED - N), (0, 0)))
    settings = list(product(SIMILARITIES, SMOOTHINGS))
    # Made once: within a mesh they would lie otherwise, and what takes them would be compiled again.
    learned = {similarity: learned(similarity) for similarity in SIMILARITIES}
    dense_losses = with_gradients(partial(dense, encode, TARGETS))
    expected = [dense_losses(learned[similarity], tokens, smoothing) for similarity, smoothing in settings]
    for sizes in MESHES:
        with within(sizes):
            losses = with_gradients(partial(streamed, encode, chunk, TARGETS))
            for setting, (wanted_gradients, wanted) in zip(settings, expected, strict=True):
                similarity, smoothing = setting
                gradients, found = losses(learned[similarity], padded, smoothing)
                case = f"{encoder_name} {chunk} {sizes} {setting}"
                np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=case)
                assert_trees_close(gradients, wanted_gradients, case)


def check_sampled() -> None:
    """Draws, losses and gradients of the sampled loss on all meshes, its arrays cut as SimGR's are."""
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
    for sizes in MESHES:
        with within(sizes):
            results.append(jax.jit(jax.grad(losses, (0, 1), has_aux=True))(users, items))
    for result in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), result, results[0])


def main() -> None:
    assert jax.device_count() == 8
    jax.config.update("jax_disable_most_optimizations", True)
    # No part's length is a multiple of the chunk.
    cases = [*product(ITEM_ENCODERS, [3]), ("mean", 0)]
    with ThreadPoolExecutor(2) as threads:  # Compiling is most of it.
        list(threads.map(check, *zip(*cases, strict=True)))
    check_sampled()


if __name__ == "__main__":
    main()
