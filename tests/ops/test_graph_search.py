from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.ops import graph_search
from simgr_jax.ops.graph_search import nearest_items

B, N, E, W, M = 4, 23, 5, 3, 2


@partial(jax.jit, static_argnames=("steps", "k"))
def search(scores, neighbors, start, history, steps, k):
    def score(items):
        return jnp.take_along_axis(scores, items, axis=1)

    return graph_search.graph_search(score, neighbors, start, steps, k, history)


def plain_search(scores, neighbors, start, steps, width, k, history):
    """One user's list of (item, score), as the paper describes the search."""
    beam = start
    for step in range(steps):
        found = {other for item in beam for other in neighbors[item] if not np.isnan(scores[other])}
        last = step == steps - 1
        if last:
            found -= set(history)
        beam = sorted(found, key=lambda item: (-scores[item], item))[: k if last else width]
    return [(item, scores[item]) for item in beam]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([1, 2, 4]),
    k=st.sampled_from([2, 7, E * W + 3]),
    levels=st.sampled_from([3, 1000]),
)
def test_each_users_list_equals_the_plain_algorithms(seed, steps, k, levels):
    """With ties, NaN scores, repeated neighbors, and lists that cannot be filled."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (B, N)).astype(np.float32)
    scores[generator.random((B, N)) < 0.1] = np.nan
    neighbors = generator.integers(0, N, (N, E))
    start, history = generator.integers(0, N, (B, W)), generator.integers(-1, N, (B, M))
    items, values = search(scores, neighbors, start, history, steps=steps, k=k)
    assert items.dtype == jnp.int32
    assert values.dtype == jnp.float32
    for user in range(B):
        expected = plain_search(scores[user], neighbors, start[user], steps, W, k, history[user])
        expected += [(-1, -np.inf)] * (k - len(expected))
        assert list(zip(items[user].tolist(), values[user].tolist(), strict=True)) == expected


def test_a_complete_graph_gives_the_best_of_all_items():
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 6, (B, N)).astype(np.float32)
    complete = np.stack([generator.permutation(N) for _ in range(N)])
    items, _ = search(scores, complete, generator.integers(0, N, (B, W)), None, steps=2, k=10)
    np.testing.assert_array_equal(items, np.argsort(-scores, axis=1, kind="stable")[:, :10])


@pytest.mark.parametrize("rows", [5, 256])
def test_nearest_items_equal_a_sort_of_the_whole_similarity_matrix(rows, monkeypatch):
    monkeypatch.setattr(graph_search, "_MOST_ROWS", rows)
    similarities = np.random.default_rng(2).integers(0, 9, (N, N)).astype(np.float32)
    nearest = nearest_items(lambda items: jnp.asarray(similarities)[items], N, 6)
    np.testing.assert_array_equal(nearest, np.argsort(-similarities, axis=1, kind="stable")[:, :6])
    assert nearest.dtype == jnp.int32


def test_nearest_items_of_a_large_catalog_are_found_in_chunks(monkeypatch):
    monkeypatch.setattr(graph_search, "_MOST_SIMILARITIES", 4 * N)
    asked = []

    def similarities(items):
        asked.append(items.shape)
        return jnp.zeros((len(items), N))

    nearest_items(similarities, N, 6)
    assert set(asked) == {(4,)}
