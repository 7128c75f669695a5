"""Residual k-means: each level clusters the residual of the levels before it."""

from __future__ import annotations

import numpy as np

from simgr_jax.semantic_ids.kmeans import kmeans


def fit(embeddings: np.ndarray, levels: int, codebook_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits x ~ c_1[code_1] + ... + c_L[code_L] (additive vector quantization), coarse to fine, one k-means per level.

    Args:
      embeddings: float32 [N, D].
      levels: L.
      codebook_size: K <= N.
      seed: of the k-means.

    Returns:
      codes int32 [N, L] and the reconstruction float32 [N, D].
    """
    codes = np.empty((len(embeddings), levels), np.int32)
    residual = embeddings.astype(np.float32)
    for level in range(levels):
        codes[:, level], centroids = kmeans(residual, codebook_size, seed + level)
        residual = residual - centroids[codes[:, level]]
    return codes, embeddings - residual
