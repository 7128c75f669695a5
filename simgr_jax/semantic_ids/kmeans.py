"""Deterministic k-means, by faiss."""

from __future__ import annotations

import faiss
import numpy as np
from threadpoolctl import threadpool_limits


def kmeans(points: np.ndarray, num_clusters: int, seed: int, iterations: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm. An empty cluster takes half of a big one.

    The initial centroids are the means of K random groups of at most 32 points. The usual choice, K random points,
    does badly here, with many dimensions and few points per cluster: such a centroid is far from all points but its
    own, so it keeps only that one, and the other points crowd into a few clusters.

    Args:
      points: float32 [N, D], N >= num_clusters.
      num_clusters: K.
      seed: of the initial centroids, and of the sample that is fitted if N > 256 K.
      iterations: of Lloyd's algorithm.

    Returns:
      codes int32 [N], the nearest centroid of each point, and centroids float32 [K, D].
    """
    points = np.ascontiguousarray(points, np.float32)
    chosen = np.random.default_rng(seed).permutation(len(points))[: 32 * num_clusters]
    start = np.stack([points[group].mean(axis=0) for group in np.array_split(chosen, num_clusters)])
    # With one thread, the order of the sums, and so the centroids, doesn't depend on the machine's core count.
    with threadpool_limits(1):
        fit = faiss.Kmeans(
            points.shape[1], num_clusters, niter=iterations, seed=seed % 2**31, min_points_per_centroid=1
        )
        fit.train(points, init_centroids=start)
    _, nearest = fit.index.search(points, 1)
    return nearest[:, 0].astype(np.int32), fit.centroids.reshape(num_clusters, -1)
