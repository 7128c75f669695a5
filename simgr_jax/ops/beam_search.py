"""Beam search over the codes of real items."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.ops.trie import Trie

State = TypeVar("State")
Step = Callable[[int, Int[Array, "B W"], Int[Array, "B W"], State], tuple[Float[Array, "B W K"], State]]


def beam_search(
    trie: Trie,
    first: Float[Array, "B K"],
    step: Step,
    state: State,
    width: int,
    k: int,
    history: Int[Array, "B M"] | None = None,
) -> tuple[Int[Array, "B k"], Float[Array, "B k"]]:
    """The k most likely items found by keeping the `width` most likely code prefixes at each level.

    Only prefixes of real items are kept. An item's score is the sum of its codes' log-probabilities as given:
    probability on codes that lead to no item is lost, not renormalised. Items with equal codes share a score and are
    all listed. Ties are ordered by codes, then by index. A NaN counts as -inf, and an item that scores -inf is not
    found. If `width` is at least the number of items, nothing is pruned and the search is exhaustive.

    Args:
      first: log-probabilities of the codes of level 0.
      step: (level, codes, parents, state) -> (log-probabilities of the level's codes [B, W, K_level], state), called
        for levels 1 to L - 1. `codes`, int32 [B, W], are the codes just chosen at the previous level. `parents`, int32
        [B, W], say which beam of the previous step each continues; gather the state by them (at level 1 there is one
        beam, 0). W is the smaller of `width` and the number of the trie's nodes at this depth.
      state: passed to the first step.
      width: at least 1.
      history: items to leave out, padded with -1. They are removed from the items found at the end.

    Returns:
      int32 items, best first, and their float32 scores; -1 and -inf where fewer than k were found.
    """
    nodes, scores = jnp.zeros((len(first), 1), jnp.int32), jnp.zeros((len(first), 1), jnp.float32)
    parents, log_probs = nodes, first[:, None]
    for level, codes in enumerate(trie.codes):
        if level:
            log_probs, state = step(level, trie.codes[level - 1][nodes], parents, state)
        children, exists = _children(trie, level, nodes)
        grown = scores[..., None] + jnp.take_along_axis(log_probs.astype(jnp.float32), codes[children], axis=2)
        # There are always enough candidates: every node of the next depth, or one child for each of `width` beams.
        nodes, scores, parents = _best(children, grown, exists, min(width, len(codes)))

    places, exists = _children(trie, trie.levels, nodes)
    items = trie.items[places]
    if history is not None:
        exists &= ~jnp.any(items[..., None] == history[:, None, None], axis=-1)
    items, scores, _ = _best(items, scores[..., None], exists, min(k, items[0].size))
    missing = ((0, 0), (0, k - items.shape[1]))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    return jnp.where(scores == -jnp.inf, -1, jnp.pad(items, missing)), scores


def _children(trie: Trie, depth: int, nodes: Int[Array, "B W"]) -> tuple[Int[Array, "B W C"], Bool[Array, "B W C"]]:
    """Each node's children and whether each exists, with C the most children of any node at this depth. Missing
    children repeat the node's first child, which always exists."""
    offsets = trie.offsets[depth]
    begins, ends = offsets[nodes][..., None], offsets[nodes + 1][..., None]
    children = begins + jnp.arange(trie.most_children[depth], dtype=jnp.int32)
    exists = children < ends
    return jnp.where(exists, children, begins), exists


def _best(
    candidates: Int[Array, "B W C"], scores: Float[Array, "B W #C"], exists: Bool[Array, "B W C"], count: int
) -> tuple[Int[Array, "B count"], Float[Array, "B count"], Int[Array, "B count"]]:
    """The `count` best candidates, their scores, and the beam that each comes from."""
    scores = jnp.where(exists & ~jnp.isnan(scores), scores, -jnp.inf)
    # Each device sorts its own rows: left alone, the compiler gathers all rows' scores.
    by_row = sharding.spec("batch", None)
    top_k = sharding.per_device(partial(jax.lax.top_k, k=count), (by_row,), by_row)
    scores, best = top_k(scores.reshape(len(scores), -1))
    chosen = jnp.take_along_axis(candidates.reshape(len(scores), -1), best, axis=1)
    return chosen, scores, best // candidates.shape[2]
