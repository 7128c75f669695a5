"""Product quantization: each level clusters its own slice of the embedding, so the codes don't depend on each other."""

from __future__ import annotations

import faiss
import numpy as np
from threadpoolctl import threadpool_limits

from simgr_jax.semantic_ids.kmeans import kmeans


def fit_pq(embeddings: np.ndarray, levels: int, codebook_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the D columns into L slices (as equal as D allows) and clusters each (Jégou et al. 2011).

    Args:
      embeddings: float32 [N, D], D >= levels.
      levels: L.
      codebook_size: K <= N.
      seed: of the k-means.

    Returns:
      codes int32 [N, L] and the reconstruction float32 [N, D].
    """
    if embeddings.shape[1] < levels:
        raise ValueError(f"{embeddings.shape[1]} dimensions can't be cut into {levels} slices")
    codes, slices = [], []
    for level, part in enumerate(np.array_split(embeddings, levels, axis=1)):
        nearest, centroids = kmeans(part, codebook_size, seed + level)
        codes.append(nearest)
        slices.append(centroids[nearest])
    return np.stack(codes, axis=1), np.concatenate(slices, axis=1)


def fit_opq(embeddings: np.ndarray, levels: int, codebook_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Product quantization after a rotation that minimizes its error (Ge et al. 2013; for semantic IDs: RPG,
    arXiv 2506.05781).

    If D is not a multiple of L, drops the D mod L directions of least variance.

    Args, Returns: see `fit_pq`.
    """
    if embeddings.shape[1] < levels:
        raise ValueError(f"{embeddings.shape[1]} dimensions can't be cut into {levels} slices")
    mean = embeddings.mean(axis=0)
    rotation = _opq_rotation(embeddings - mean, levels, codebook_size, seed)
    codes, reconstruction = fit_pq((embeddings - mean) @ rotation.T, levels, codebook_size, seed)
    return codes, reconstruction @ rotation + mean


def _opq_rotation(points: np.ndarray, levels: int, codebook_size: int, seed: int) -> np.ndarray:
    """Learns a rotation, float32 [D', D] with orthonormal rows. D' is the largest multiple of `levels` up to D.

    Starts from Ge et al.'s parametric solution, the best for Gaussian data: each slice gets principal directions with
    about the same product of variances. A few rounds from there do better than many from faiss's random start. The
    rounds use at most 64 codes, which is as good as 256 and several times faster.
    """
    dim = points.shape[1]
    kept = dim // levels * levels
    variances, directions = np.linalg.eigh(points.T.astype(np.float64) @ points)
    strongest = np.argsort(-variances)[:kept]
    order = _balanced_slices(variances[strongest], levels)
    start = directions[:, strongest[order]].T.astype(np.float32)
    quantizer = faiss.ProductQuantizer(kept, levels, min(6, int(np.log2(codebook_size))))
    quantizer.cp.seed = seed % 2**31
    quantizer.cp.min_points_per_centroid = 1
    opq = faiss.OPQMatrix(dim, levels, kept)
    opq.pq = quantizer
    opq.niter = 20
    faiss.copy_array_to_vector(start.ravel(), opq.A)
    if len(points) < dim:  # Faiss would write beyond a buffer that has room for one value per point and dimension.
        points = np.resize(points, (dim, dim))  # The same points again and again.
    with threadpool_limits(1):
        opq.train(np.ascontiguousarray(points, np.float32))
    return faiss.vector_to_array(opq.A).reshape(kept, dim)


def _balanced_slices(variances: np.ndarray, levels: int) -> np.ndarray:
    """Deals out variances [D], largest first, to `levels` slices of equal size: each to the one of smallest product.

    Returns:
      int [D], the indices of the variances, slice by slice.
    """
    logs = np.log(np.maximum(variances / variances[0], 1e-12)) - np.log(1e-12)  # >= 0: products only grow
    slices: list[list[int]] = [[] for _ in range(levels)]
    products = np.zeros(levels)
    for place, log in enumerate(logs):
        chosen = int(products.argmin())
        slices[chosen].append(place)
        products[chosen] = np.inf if len(slices[chosen]) == len(logs) // levels else products[chosen] + log
    return np.concatenate(slices)
