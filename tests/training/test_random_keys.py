import itertools

import jax
import jax.numpy as jnp
import numpy as np

from simgr_jax.training.random_keys import step_rngs


def keys(rngs) -> dict[str, list[tuple[int, ...]]]:
    """The key of each stream, and the next three keys that are drawn from it."""

    def all_of(stream):
        return [tuple(jax.random.key_data(key).tolist()) for key in (stream.key[...], *(stream() for _ in range(3)))]

    return {name: all_of(rngs[name]) for name in ("dropout", "negatives")}


def test_the_two_streams_never_share_a_key():
    """Neither within a step, nor between steps or seeds."""
    found = [keys(step_rngs(seed, jnp.int32(step))) for seed in range(3) for step in range(4)]
    every = list(itertools.chain(*(stream for streams in found for stream in streams.values())))
    assert len(every) == 3 * 4 * 2 * 4
    assert len(set(every)) == len(every)


def test_keys_depend_on_the_seed_and_the_step_alone():
    """So a resumed run draws the same, compiled or not."""
    expected = keys(step_rngs(5, jnp.int32(7)))
    assert keys(step_rngs(5, jnp.int32(7))) == expected

    @jax.jit
    def drawn(step):
        rngs = step_rngs(5, step)
        return [jax.random.key_data(key()) for key in (rngs.dropout, rngs.negatives)]

    np.testing.assert_array_equal(drawn(jnp.int32(7)), [expected["dropout"][1], expected["negatives"][1]])
