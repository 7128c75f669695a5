"""Item embeddings from the training sequences, for catalogs without text."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from simgr_jax.data.dataset import Sequences


def cooccurrence(train: Sequences, num_items: int, dim: int, seed: int, window: int) -> np.ndarray:
    """Factorizes the positive pointwise mutual information of items that are close in a sequence.

    **Interactions held out for validation and test are never seen**: only the training sequences are read. The
    resulting semantic IDs leak nothing about the evaluation targets.

    PPMI[i, j] = max(0, log(n_ij n / (n_i n_j))), where n_ij counts the pairs of i and j within `window` positions, and
    a pair at distance d counts 1/d. The embeddings are U sqrt(S) of its SVD (Levy and Goldberg 2014, "Neural word
    embedding as implicit matrix factorization").

    Args:
      train: the training sequences.
      num_items: N.
      dim: D, the number of singular vectors to keep; fewer if the catalog is smaller.
      seed: of the randomized SVD.
      window: the largest distance of a pair.

    Returns:
      float32 [N, D], rows of unit length; zero rows for items that occur near no other item.
    """
    ppmi = _ppmi(_pair_counts(train, num_items, window))
    with threadpool_limits(1):  # the result must not depend on the core count
        left, singular_values, _ = randomized_svd(ppmi, min(dim, num_items), n_iter=4, random_state=seed)
    left[np.diff(ppmi.indptr) == 0] = 0  # the SVD leaves rounding errors there, which normalizing would blow up
    return normalize(left * np.sqrt(singular_values)).astype(np.float32)


def _pair_counts(train: Sequences, num_items: int, window: int) -> scipy.sparse.csr_array:
    """float32 [N, N], symmetric with a zero diagonal."""
    owner = np.repeat(np.arange(len(train)), train.lengths)
    counts = scipy.sparse.csr_array((num_items, num_items), dtype=np.float32)
    for distance in range(1, window + 1):
        first, second = train.values[:-distance], train.values[distance:]
        kept = (owner[:-distance] == owner[distance:]) & (first != second)
        weights = np.full(kept.sum(), 1 / distance, np.float32)
        counts = counts + scipy.sparse.coo_array((weights, (first[kept], second[kept])), counts.shape).tocsr()
    return (counts + counts.T).tocsr()


def _ppmi(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    totals = counts.sum(axis=1).astype(np.float64)
    pairs = counts.tocoo()
    information = np.log(pairs.data * totals.sum() / (totals[pairs.row] * totals[pairs.col]))
    ppmi = scipy.sparse.csr_array((np.maximum(information, 0).astype(np.float32), (pairs.row, pairs.col)), counts.shape)
    ppmi.eliminate_zeros()
    return ppmi
