"""Product quantization: each level clusters its own slice of the embedding, so the codes don't depend on each other."""

from __future__ import annotations

import faiss
import numpy as np

from simgr_jax.semantic_ids.kmeans import kmeans, one_thread


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
    """Product quantization after the rotation that makes it lose least (Ge et al. 2013; semantic IDs: RPG,
    arXiv 2506.05781).

    Columns of zeros are added where D is not a multiple of L; the rotation spreads the rest over them.

    Args, Returns: those of `fit_pq`.
    """
    num_items, dim = embeddings.shape
    if dim < levels:
        raise ValueError(f"{dim} dimensions can't be cut into {levels} slices")
    padded = np.zeros((num_items, -(-dim // levels) * levels), np.float32)
    padded[:, :dim] = embeddings
    rotation = _opq_rotation(padded, levels, codebook_size, seed)
    codes, reconstruction = fit_pq(padded @ rotation.T, levels, codebook_size, seed)
    return codes, (reconstruction @ rotation)[:, :dim]


def _opq_rotation(points: np.ndarray, levels: int, codebook_size: int, seed: int) -> np.ndarray:
    """float32 [D, D] orthogonal, D a multiple of `levels`."""
    dim = points.shape[1]
    rng = np.random.default_rng(seed)
    start, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    # faiss counts codes in bits; the rotation hardly depends on K, so the next smaller power of two does.
    quantizer = faiss.ProductQuantizer(dim, levels, max(1, int(np.log2(codebook_size))))
    quantizer.cp.seed = seed % 2**31
    quantizer.cp.min_points_per_centroid = 1
    opq = faiss.OPQMatrix(dim, levels, dim)
    opq.pq = quantizer
    faiss.copy_array_to_vector(start.astype(np.float32).ravel(), opq.A)
    with one_thread():
        opq.train(np.ascontiguousarray(points))
    return faiss.vector_to_array(opq.A).reshape(dim, dim)
