"""Popularity: every user gets the items with the most interactions in training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.models.model_inputs import Catalog, ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.ops.tied_rank import tied_rank
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """Popularity has no options."""

    name = "popularity"
    is_trained = False


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> Popularity:
    return Popularity(inputs.item_counts)


class Popularity(nnx.Module):
    """Implements `recommender.Recommender` by counting; nothing is trained."""

    def __init__(self, item_counts: Int[np.ndarray, " N"]):
        self.num_items = len(item_counts)
        self.counts = Catalog(jnp.asarray(item_counts, jnp.float32))

    def catalog(self) -> Float[Array, " N"]:
        return self.counts[...]

    def rank(self, batch: RankBatch, catalog: Float[Array, " N"], k: int, filter_history: bool) -> Ranking:
        scores = jnp.broadcast_to(catalog, (len(batch.targets), self.num_items))
        if filter_history:
            scores = without_history(scores, batch.history)
        return rank_catalog(scores, batch.targets, k)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, " N"]) -> Float[Array, "B N"]:
        # Adds one to every count, so that an item without interactions keeps some probability.
        scores = jnp.broadcast_to(jnp.log(catalog + 1), (len(batch.targets), self.num_items))
        return jax.nn.log_softmax(scores)


def rank(train: Sequences, num_items: int, targets: Int[np.ndarray, " C"], k: int) -> Ranking:
    """Ranks the whole catalog by its counts in training, for all C cases at once.

    Ties follow `ops.top_k.rank_catalog`: listed in the order of their index, targets given their mean rank.

    Args:
      train: sequences of item indices below `num_items`.
      num_items: the size N of the catalog; k <= N.
      targets: int [C].
      k: the length of the lists.

    Returns:
      A Ranking of numpy arrays. `items` and `scores` are read-only views of one row, so no [C, N] array is made.
    """
    counts, order, better, tied = _counted(train, num_items, targets, k)
    top, shape = order[:k], (len(targets), k)
    return Ranking(
        items=np.broadcast_to(top, shape),
        scores=np.broadcast_to(counts[top].astype(np.float32), shape),
        target_rank=tied_rank(better, tied).astype(np.float32),
    )


def rank_without_history(train: Sequences, num_items: int, cases: EvaluationCases, k: int) -> Ranking:
    """Like `rank`, but without the items of each case's history; a target among them has rank inf."""
    counts, order, better, tied = _counted(train, num_items, cases.targets, k)
    # Distinct history items, as pairs (case, item).
    owners = np.repeat(np.arange(len(cases), dtype=np.int64), cases.histories.lengths)
    owners, seen = np.divmod(np.unique(owners * num_items + cases.histories.values), num_items)
    of_target, is_target = counts[cases.targets][owners], seen == cases.targets[owners]
    count = lambda chosen: np.bincount(owners[chosen], minlength=len(cases))  # noqa: E731
    better = better - count(counts[seen] > of_target)
    tied = tied - count((counts[seen] == of_target) & ~is_target)
    ranks = np.where(count(is_target) > 0, np.inf, tied_rank(better, tied))

    # Each case's history items by their place in the order of popularity, and how many of the other items come before.
    place = np.empty(num_items, np.int64)
    place[order] = np.arange(num_items)
    _, places = np.divmod(np.sort(owners * num_items + place[seen]), num_items)
    others_before = places - (np.arange(len(owners)) - np.searchsorted(owners, owners))
    # The j-th other item has place j, and one more for each history item that has at most j others before it.
    near = others_before < k
    moved = np.zeros((len(cases), k), np.int64)
    np.add.at(moved, (owners[near], others_before[near]), 1)
    places = np.arange(k) + np.cumsum(moved, axis=1)
    items = np.where(places < num_items, order[np.minimum(places, num_items - 1)], -1)
    scores = np.where(items >= 0, counts[items], -np.inf)
    return Ranking(items.astype(np.int32), scores.astype(np.float32), ranks.astype(np.float32))


def _counted(train: Sequences, num_items: int, targets: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """The items' counts; the items, most popular first; and for each target, how many items are more popular and how
    many tie with it."""
    if k > num_items:
        raise ValueError(f"k = {k} is larger than the catalog of {num_items}")
    counts = np.bincount(train.values, minlength=num_items)
    rising = np.sort(counts)
    below = np.searchsorted(rising, counts[targets], side="left")
    up_to = np.searchsorted(rising, counts[targets], side="right")
    return counts, most_popular(train, num_items), num_items - up_to, up_to - below - 1


def most_popular(train: Sequences, num_items: int) -> Int[np.ndarray, " N"]:
    """All items from the most to the least popular in training, ties by index; int32."""
    return np.argsort(-np.bincount(train.values, minlength=num_items), kind="stable").astype(np.int32)
