"""Beam search over the codes of real items."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from simgr_jax import sharding
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
    """The likeliest of the items that the likeliest beginnings of codes lead to, `width` of them kept on each level.

    Only beginnings of real items are kept. An item's score is the sum of the log-probabilities of its codes as they are
    given: what falls on codes that lead to no item is lost, not shared out among the others. Items of equal codes share
    a score and are all listed. Equal scores are listed in the order of their codes, then of their index. A NaN counts
    as -inf, and what has -inf is not found. Nothing is pruned, so this is exhaustive search, where `width` is at least
    the number of items.

    Args:
      first: log-probabilities of the codes of level 0.
      step: (level, codes, parents, state) -> (log-probabilities of the level's codes [B, W, K_level], state), called
        for the levels 1 to L - 1. codes int32 [B, W] are those of the level before that were just chosen; parents
        int32 [B, W] are the beams of the step before that they continue, by which the state is to be gathered (on level
        1 there is one, 0). W is `width`, or the number of the trie's nodes at this depth if that is less.
      state: what the first step gets.
      width: from 1.
      history: items that are not listed, and -1 for none. They are taken out at the end, from what was found.

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
        # There are enough candidates: as many as nodes at the next depth, or `width` beams with a child each.
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
    """The children of each node, as many as any node of this depth has, and whether they exist. In the place of one
    that doesn't is the node's first child: every node has one."""
    offsets = trie.offsets[depth]
    begins, ends = offsets[nodes][..., None], offsets[nodes + 1][..., None]
    children = begins + jnp.arange(trie.most_children[depth], dtype=jnp.int32)
    exists = children < ends
    return jnp.where(exists, children, begins), exists


def _best(
    candidates: Int[Array, "B W C"], scores: Float[Array, "B W #C"], exists: Bool[Array, "B W C"], count: int
) -> tuple[Int[Array, "B count"], Float[Array, "B count"], Int[Array, "B count"]]:
    """The candidates of the highest scores, their scores, and the beam that each is from."""
    scores = jnp.where(exists & ~jnp.isnan(scores), scores, -jnp.inf)
    # Called by each device for its own rows: the compiler would gather the scores of all.
    by_row = sharding.spec("batch", None)
    top_k = sharding.per_device(partial(jax.lax.top_k, k=count), (by_row,), by_row)
    scores, best = top_k(scores.reshape(len(scores), -1))
    chosen = jnp.take_along_axis(candidates.reshape(len(scores), -1), best, axis=1)
    return chosen, scores, best // candidates.shape[2]
