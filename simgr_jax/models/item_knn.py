"""Item-kNN: what was bought by the buyers of a history's items (Deshpande & Karypis, ACM TOIS 22(1), 2004)."""

from __future__ import annotations

import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.sparse
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax import sharding
from simgr_jax.batch import RankBatch
from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.models.inputs import Catalog, ModelInputs
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> ItemKNN:
    """
    Raises:
      UserError: a value that the model can't have.
    """
    options = config.item_knn
    if options.neighbors < 1:
        raise UserError(f"config.item_knn.neighbors: {options.neighbors} is too few; give a number from 1, like 100")
    if options.shrinkage < 0:
        raise UserError(f"config.item_knn.shrinkage: {options.shrinkage} is negative; give 0 or more")
    return ItemKNN(*neighbors(inputs.train, inputs.semantic_ids.num_items, options.neighbors, options.shrinkage))


class ItemKNN(nnx.Module):
    """Implements `recommender.Recommender`; there is nothing to train.

    The score of an item is the sum of its weights among the neighbors of each of the history's items; one that occurs
    twice counts twice.

    Args: as `neighbors` returns them.
    """

    windows = "history"

    def __init__(self, items: Int[np.ndarray, "N K"], weights: Float[np.ndarray, "N K"]):
        self.num_items = len(items)
        self.neighbors = Catalog(jnp.asarray(items, jnp.int32))
        self.weights = Catalog(jnp.asarray(weights, jnp.float32))

    def catalog(self) -> Float[Array, "N K"]:
        return self.weights[...]

    def rank(self, batch: RankBatch, catalog: Float[Array, "N K"], k: int, filter_history: bool) -> Ranking:
        # A place without an item adds the weight 0 to some.
        weights = catalog[batch.history] * (batch.history >= 0)[..., None]
        rows = jnp.arange(len(batch.history))[:, None, None]
        scores = jnp.zeros((len(batch.history), self.num_items)).at[rows, self.neighbors[batch.history]].add(weights)
        scores = sharding.constrain(scores, "batch", None)
        if filter_history:
            scores = without_history(scores, batch.history)
        return rank_catalog(scores, batch.targets, k)


def neighbors(
    train: Sequences, num_items: int, count: int, shrinkage: float
) -> tuple[Int[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
    """The items most alike each item, by the users that they share.

    The weight of i and j is n_ij / (sqrt(n_i n_j) + shrinkage), n_ij the number of users who have both, n_i and n_j of
    those who have each: the cosine of two columns of the user-item matrix, smaller where few users tell.

    Args:
      train: the training sequences, one a user.
      num_items: N.
      count: K, at most; fewer where the catalog is smaller.

    Returns:
      int32 [N, K] neighbors, best first, those of equal weight by index; and their weights, float32 [N, K]. What is no
      neighbor has weight 0.
    """
    users = np.repeat(np.arange(len(train)), train.lengths)
    matrix = scipy.sparse.csr_array((np.ones(len(users)), (users, train.values)), (len(train), num_items))
    matrix.data[:] = 1  # Once or often is the same.
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
