"""Item-kNN: recommends the items most similar to a history's items, by the users that they share (Deshpande & Karypis,
ACM TOIS 22(1), 2004)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.sparse
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.models.model_inputs import Catalog, ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      neighbors: how many similar items each item keeps.
      shrinkage: adds this many users to every pair's count, so that rare pairs score low.
    """

    name = "item_knn"
    is_trained = False

    neighbors: int = 20
    shrinkage: float = 30.0

    def __post_init__(self):
        self.require(self.neighbors >= 1, "neighbors", "give a number from 1, like 100")
        self.require(self.shrinkage >= 0, "shrinkage", "give 0 or more")


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> ItemKNN:
    return ItemKNN(*neighbors(inputs.train, inputs.num_items, options.neighbors, options.shrinkage))


class ItemKNN(nnx.Module):
    """Implements `recommender.Recommender`; nothing is trained.

    An item's score is the sum of its weights as a neighbor of the history's items. An item that occurs twice in the
    history counts twice.

    Args:
      items, weights: what `neighbors` returns.
    """

    def __init__(self, items: Int[np.ndarray, "N K"], weights: Float[np.ndarray, "N K"]):
        self.num_items = len(items)
        self.neighbors = Catalog(jnp.asarray(items, jnp.int32))
        self.weights = Catalog(jnp.asarray(weights, jnp.float32))

    def catalog(self) -> Float[Array, "N K"]:
        return self.weights[...]

    def rank(self, batch: RankBatch, catalog: Float[Array, "N K"], k: int, filter_history: bool) -> Ranking:
        # Padding adds weight 0.
        weights = catalog[batch.inputs] * (batch.segment_ids > 0)[..., None]
        rows = jnp.arange(len(batch.inputs))[:, None, None]
        scores = jnp.zeros((len(batch.inputs), self.num_items)).at[rows, self.neighbors[batch.inputs]].add(weights)
        scores = sharding.constrain(scores, "batch", None)
        if filter_history:
            scores = without_history(scores, batch.history)
        return rank_catalog(scores, batch.targets, k)


def neighbors(
    train: Sequences, num_items: int, count: int, shrinkage: float
) -> tuple[Int[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
    """The items most similar to each item, by the users that they share.

    The weight of i and j is n_ij / (sqrt(n_i n_j) + shrinkage), where n_i users have i, n_j have j, and n_ij have both.
    It is the cosine of two columns of the user-item matrix, shrunk most for rare items.

    Args:
      train: the training sequences, one per user.
      num_items: N.
      count: K; at most N are returned.

    Returns:
      The neighbors, int32 [N, K], best first, ties by index; and their weights, float32 [N, K]. Empty slots have
      weight 0.
    """
    users = np.repeat(np.arange(len(train)), train.lengths)
    matrix = scipy.sparse.csr_array((np.ones(len(users)), (users, train.values)), (len(train), num_items))
    matrix.data[:] = 1  # An item counts once per user.
    shared = (matrix.T @ matrix).tocoo()
    sizes = shared.diagonal()
    is_pair = shared.row != shared.col
    first, second, together = shared.row[is_pair], shared.col[is_pair], shared.data[is_pair]
    weights = together / (np.sqrt(sizes[first] * sizes[second]) + shrinkage)

    order = np.lexsort((second, -weights, first))
    first, second, weights = first[order], second[order], weights[order]
    place = np.arange(len(first)) - np.searchsorted(first, first)
    kept = place < count
    shape = (num_items, min(count, num_items))
    items, item_weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    items[first[kept], place[kept]], item_weights[first[kept], place[kept]] = second[kept], weights[kept]
    return items, item_weights
