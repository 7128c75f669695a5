"""The ranker that knows no user: every history gets the items most interacted with in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.batch import RankBatch
from simgr_jax.data.dataset import Sequences
from simgr_jax.models.inputs import Catalog, ModelInputs
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history


def create(_: ml_collections.ConfigDict, inputs: ModelInputs) -> Popularity:
    return Popularity(inputs.item_counts)


class Popularity(nnx.Module):
    """Implements `recommender.Recommender`; there is nothing to train."""

    windows = "history"

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
        # One added to every count: what was never bought may still be.
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
      A Ranking of numpy arrays; `items` and `scores` are one read-only row seen C times, so no [C, N] exists.
    """
    if k > num_items:
        raise ValueError(f"k = {k} is larger than the catalog of {num_items}")
    counts = np.bincount(train.values, minlength=num_items)
    top = np.argsort(-counts, kind="stable")[:k]
    rising = np.sort(counts)
    below = np.searchsorted(rising, counts[targets], side="left")
    up_to = np.searchsorted(rising, counts[targets], side="right")
    first, last = num_items - up_to + 1, num_items - below  # The ranks that a target and its ties share.
    shape = (len(targets), k)
    return Ranking(
        items=np.broadcast_to(top.astype(np.int32), shape),
        scores=np.broadcast_to(counts[top].astype(np.float32), shape),
        target_rank=((first + last) / 2).astype(np.float32),
    )
