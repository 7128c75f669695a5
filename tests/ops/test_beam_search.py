"""Compared with a beam search in plain Python. The model is a table where a code's log-probability depends on all codes
before it, so a beam with another beam's state gets wrong scores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.ops import trie as tries
from simgr_jax.ops.beam_search import beam_search

SIZES = (3, 4, 2)
ROWS = 2


def tables(seed):
    """Log-probabilities for each level: [ROWS, codes before ..., K_level]."""
    generator = np.random.default_rng(seed)
    logits = [generator.normal(size=(ROWS, *SIZES[: level + 1])) for level in range(len(SIZES))]
    return [np.array(jax.nn.log_softmax(2 * table), np.float32) for table in logits]


def random_codes(seed, num_items):
    """int [N, 3], all distinct if N is at most the number of possible codes."""
    every = np.stack(np.unravel_index(np.arange(math.prod(SIZES)), SIZES), axis=1)
    generator = np.random.default_rng(seed)
    return every[generator.choice(len(every), num_items, replace=num_items > len(every))]


@functools.partial(jax.jit, static_argnames=("width", "k"))
def search(trie, log_probs, width, k, history=None):
    """The state is the codes chosen so far; gathering by `parents` is what keeps it right."""

    def step(level, codes, parents, chosen):
        chosen = jnp.concatenate([jnp.take_along_axis(chosen, parents[..., None], axis=1), codes[..., None]], axis=2)
        assert chosen.shape[2] == level
        users = jnp.arange(ROWS)[:, None]
        return log_probs[level][users, *jnp.moveaxis(chosen, 2, 0)], chosen

    return beam_search(trie, log_probs[0], step, jnp.zeros((ROWS, 1, 0), jnp.int32), width, k, history)


def plain_search(codes, log_probs, user, width):
    """[(score, item)] of every item that the beam reaches, best first; ties by codes, then by index."""
    score = lambda path: sum(log_probs[level][user, *path[: level + 1]] for level in range(len(path)))  # noqa: E731
    beam = [()]
    for level in range(codes.shape[1]):
        grown = {tuple(row[: level + 1]) for row in codes.tolist() if tuple(row[:level]) in beam}
        beam = sorted(grown, key=lambda path: (-score(path), path))[:width]
    return [(score(path), item) for path in beam for item in np.flatnonzero((codes == path).all(axis=1))]


def agree(codes, log_probs, width, k, history=None):
    items, scores = search(tries.build(codes, SIZES), log_probs, width, k, history)
    assert items.dtype == jnp.int32 and scores.dtype == jnp.float32
    for user in range(ROWS):
        found = plain_search(codes, log_probs, user, width)
        if history is not None:
            found = [(score, item) for score, item in found if item not in history[user]]
        found = (found + [(-np.inf, -1)] * k)[:k]
        np.testing.assert_array_equal(items[user], [item for _, item in found])
        np.testing.assert_allclose(scores[user], [score for score, _ in found], rtol=1e-5)


# Few catalogs and widths, because each combination is compiled.
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    catalog=st.sampled_from([(0, 1), (1, 9), (2, 9), (3, 40)]),
    width=st.sampled_from([1, 3, 5]),
)
def test_it_finds_what_a_plain_beam_search_finds(seed, catalog, width):
    agree(random_codes(*catalog), tables(seed), width, k=4)


@pytest.mark.parametrize("num_items", [16, 40])
def test_a_beam_as_wide_as_the_catalog_ranks_all_of_it(num_items):
    """With 40 items on 24 paths, items on the same path are all listed with the same score, by index."""
    codes, log_probs = random_codes(3, num_items), tables(3)
    items, scores = search(tries.build(codes, SIZES), log_probs, num_items, num_items)
    for user in range(ROWS):
        paths = [codes[:, : level + 1].T for level in range(3)]
        exact = sum(table[user, *path] for table, path in zip(log_probs, paths, strict=True))
        order = np.lexsort((np.arange(num_items), *codes.T[::-1], -exact))
        np.testing.assert_array_equal(items[user], order)
        np.testing.assert_allclose(scores[user], exact[order], rtol=1e-5)


def test_history_items_are_not_listed_but_items_with_the_same_codes_are():
    codes, log_probs = random_codes(5, 40), tables(5)
    best = search(tries.build(codes, SIZES), log_probs, 6, 5)[0]
    history = np.concatenate([np.asarray(best[:, :2]), np.full((ROWS, 3), -1)], axis=1)
    agree(codes, log_probs, width=6, k=5, history=history)


def test_a_list_with_too_few_items_is_padded():
    codes, log_probs = random_codes(1, 5), tables(1)
    agree(codes, log_probs, width=2, k=4)
    agree(codes, log_probs, width=50, k=9)
    everything = np.tile(np.arange(5), (ROWS, 1))
    agree(codes, log_probs, width=50, k=9, history=everything)


def test_it_never_follows_codes_that_lead_to_no_item():
    """No item has the code that is by far the likeliest."""
    codes = np.array([[0, 1, 0], [2, 1, 1], [2, 3, 0]])
    log_probs = [np.full((ROWS, *SIZES[: level + 1]), -9.0, np.float32) for level in range(3)]
    log_probs[0][:, 1] = log_probs[1][:, :, 2] = -0.1
    items, scores = search(tries.build(codes, SIZES), log_probs, 4, 4)
    np.testing.assert_array_equal(items, [[0, 1, 2, -1]] * ROWS)
    np.testing.assert_allclose(scores, [[-27, -27, -27, -np.inf]] * ROWS)


def test_codes_without_probability_and_nan_are_not_found():
    codes, log_probs = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]]), tables(0)
    log_probs[0][:, 0], log_probs[1][:, 1] = -np.inf, np.nan
    for width in (1, 3):
        items, scores = search(tries.build(codes, SIZES), log_probs, width, 3)
        found = np.asarray(items[items >= 0])
        assert set(found) <= {2}
        assert np.isneginf(scores[items < 0]).all() and np.isfinite(scores[items >= 0]).all()
    np.testing.assert_array_equal(items, [[2, -1, -1]] * ROWS)


def test_one_level_is_a_ranking_of_its_codes():
    codes = np.array([[4], [0], [2], [0]])
    first = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.2, 0.2]]))
    items, _ = beam_search(tries.build(codes, (5,)), first, None, None, width=2, k=3)
    np.testing.assert_array_equal(items, [[2, 0, -1]])
