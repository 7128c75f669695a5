"""Decoding along a graph of similar items, at a cost that grows with the beam, not with the catalog (RPG, arXiv
2506.05781, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The most similarities that `nearest_items` holds at once: 256 MiB of float32.
_MOST_SIMILARITIES = 2**26
_MOST_ROWS = 256


def nearest_items(
    similarities: Callable[[Int[Array, " C"]], Float[Array, "C N"]], num_items: int, count: int
) -> Int[Array, "N E"]:
    """Each item's most similar items, itself included, best first; ties are in index order.

    Args:
      similarities: from C items to their similarities with all N. Called in chunks, so no [N, N] array exists.
      count: E, at most N.

    Returns:
      int32.
    """
    rows = max(1, min(_MOST_ROWS, _MOST_SIMILARITIES // num_items))
    chunks = -(-num_items // rows)
    items = jnp.minimum(jnp.arange(chunks * rows), num_items - 1).reshape(chunks, rows)
    nearest = jax.lax.map(lambda chunk: jax.lax.top_k(similarities(chunk), count)[1], items)
    return nearest.reshape(-1, count)[:num_items].astype(jnp.int32)


def graph_search(
    score: Callable[[Int[Array, "B C"]], Float[Array, "B C"]],
    neighbors: Int[Array, "N E"],
    start: Int[Array, "B W"],
    steps: int,
    k: int,
    history: Int[Array, "B M"] | None = None,
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """The best items found in `steps` steps from `start`.

    Each step scores all neighbors of a beam of W items and keeps the W best as the next beam. The last step's K best
    are returned. Ties are in index order, and an item whose score is NaN is not found.

    Args:
      score: from each user's own C candidates to their scores. Candidates that do not count are passed as item 0.
      neighbors: item indices. An item that is its own neighbor can stay in the beam.
      start: items, which may repeat.
      steps: at least 1.
      history: items to leave out of the result, padded with -1; the search may still pass through them.

    Returns:
      int32 items, best first, and their float32 scores; -1 and -inf where fewer were found.
    """

    def next_beam(_, beam):
        return _best(score, _reached(neighbors, beam), start.shape[1])[0]

    beam = jax.lax.fori_loop(0, steps - 1, next_beam, start.astype(jnp.int32))
    found = _reached(neighbors, beam)
    if history is not None:
        found = jnp.where(jnp.any(found[:, :, None] == history[:, None, :], axis=-1), -1, found)
    return _best(score, found, k)


def _reached(neighbors: Int[Array, "N E"], beam: Int[Array, "B W"]) -> Int[Array, "B C"]:
    """The beam's neighbors in index order, with -1 in place of repeats; C = W E."""
    found = jnp.where((beam >= 0)[:, :, None], neighbors[jnp.maximum(beam, 0)], -1)
    found = jnp.sort(found.reshape(len(beam), -1), axis=1)
    repeats = jnp.pad(found[:, 1:] == found[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(repeats, -1, found)


def _best(
    score: Callable[[Int[Array, "B C"]], Float[Array, "B C"]], candidates: Int[Array, "B C"], count: int
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """The `count` best candidates, ignoring -1."""
    scores = score(jnp.maximum(candidates, 0)).astype(jnp.float32)
    scores = jnp.where((candidates < 0) | jnp.isnan(scores), -jnp.inf, scores)
    values, places = jax.lax.top_k(scores, min(count, candidates.shape[1]))
    items = jnp.where(values == -jnp.inf, -1, jnp.take_along_axis(candidates, places, axis=1))
    missing = ((0, 0), (0, count - items.shape[1]))
    return jnp.pad(items, missing, constant_values=-1), jnp.pad(values, missing, constant_values=-jnp.inf)
