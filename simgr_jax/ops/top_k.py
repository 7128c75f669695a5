"""Exact top-K over the catalog, and the rank of each target with ties shared fairly."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.ops.tied_rank import num_ahead, tied_rank


class Ranking(NamedTuple):
    """A recommender's lists for B histories, and the ranks of their targets.

    Attributes:
      items: int32 [B, K], the recommended items, best first; -1 fills a list shorter than K.
      scores: float32 [B, K], their scores, never rising along a list; -inf where `items` is -1.
      target_rank: float32 [B], the target's rank from 1. A target that ties with m other items gets the mean of the
        m + 1 ranks that they share, so it may end in .5; inf if the recommender doesn't place the target at all.
    """

    items: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    target_rank: Float[Array, " B"]


def rank_catalog(
    scores: Float[Array, "B N"], targets: Int[Array, " B"], k: int, num_items: int | None = None
) -> Ranking:
    """Ranks the whole catalog by score.

    Items with equal scores are listed in order of their index. A NaN score counts as the lowest of all, and a target
    with a score of NaN or -inf has rank inf: a model that diverged must not look good. Jittable, with `k` static.

    Within `sharding.per_device`, `scores` are for this device's items; every device gets the whole ranking.

    Args:
      k: at most the number of items.
      num_items: columns from here on are padding, which is never recommended and never ahead of a target. None means
        that there is no padding.
    """
    here = scores.shape[1]
    first = sharding.part_index("items") * here
    columns = targets - first
    target_scores = jnp.take_along_axis(scores, jnp.clip(columns, 0, here - 1)[:, None], axis=1)
    is_here = (columns >= 0) & (columns < here)
    target_scores = sharding.psum(jnp.where(is_here[:, None], target_scores, 0), "items")

    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    is_item = num_items is None or first + jnp.arange(here) < num_items
    values, items = _top_k(jnp.where(is_item, scores, -jnp.inf), first, k)
    # The target ties with itself, which `tied_rank` does not count: hence 0.5 less.
    ahead = sharding.psum(num_ahead(scores, target_scores, is_item), "items")
    rank = tied_rank(ahead - 0.5, 0)
    # A target without a score (NaN), or one that is ruled out as a history item (-inf), is not placed.
    rank = jnp.where(target_scores[:, 0] > -jnp.inf, rank, jnp.inf)
    # Items that are ruled out are not recommended, even if no others are left.
    items = jnp.where(values == -jnp.inf, -1, items)
    return Ranking(items.astype(jnp.int32), values.astype(jnp.float32), rank)


def without_history(scores: Float[Array, "B N"], history: Int[Array, "B M"]) -> Float[Array, "B N"]:
    """The scores with -inf for history items, so that they are never recommended; see `in_history`."""
    return jnp.where(in_history(scores, history), -jnp.inf, scores)


def in_history(scores: Float[Array, "B N"], history: Int[Array, "B M"]) -> Bool[Array, "B N"]:
    """Whether each score is of an item in the history.

    Within `sharding.per_device`, `scores` are for this device's items.

    Args:
      history: item indices; -1 is no item.
    """
    here = scores.shape[1]
    columns = history - sharding.part_index("items") * here
    is_here = (history >= 0) & (columns >= 0) & (columns < here)
    rows = jnp.arange(len(scores))[:, None]
    return jnp.zeros(scores.shape, bool).at[rows, jnp.where(is_here, columns, here)].set(True, mode="drop")


def _top_k(scores: Float[Array, "B N"], first: Int[Array, ""] | int, k: int) -> tuple[Array, Array]:
    """The values and items of the best k, over all parts of the catalog."""
    # XLA's own top_k is the fastest exact way on CPU too: block-wise variants take three times as long.
    values, items = jax.lax.top_k(scores, min(k, scores.shape[1]))
    values, items = sharding.all_gather(values, "items"), sharding.all_gather(items + first, "items")
    if values.shape[1] == min(k, scores.shape[1]):  # There is one part.
        return values, items
    # The parts are in order of their items, so equal scores stay in order of their index.
    values, best = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(items, best, axis=1)


def rank_in_list(
    items: Int[Array, "B K"], scores: Float[Array, "B K"], targets: Int[Array, " B"]
) -> Float[Array, " B"]:
    """The targets' ranks within recommended lists, for recommenders that return only a list (beam search, files).

    Ties within the list share their mean rank as in `rank_catalog`; a list may be in any order and may be filled up
    with items of -1, which never count.

    Returns:
      float32 [B], from 1; inf where the target is not in the list or its score is NaN.
    """
    listed = (items >= 0) & ~jnp.isnan(scores)
    is_target = listed & (items == targets[:, None])
    target_scores = jnp.max(scores, axis=1, keepdims=True, where=is_target, initial=-jnp.inf)
    rank = tied_rank(num_ahead(scores, target_scores, listed & ~is_target), 0)
    return jnp.where(is_target.any(axis=1), rank, jnp.inf)
