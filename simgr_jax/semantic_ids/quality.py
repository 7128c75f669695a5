"""The quality of semantic IDs: collisions, codebook use, reconstruction error."""

from __future__ import annotations

from typing import Any

import numpy as np

from simgr_jax.semantic_ids.collisions import groups


def report(
    codes: np.ndarray,
    codebook_sizes: tuple[int, ...],
    embeddings: np.ndarray | None = None,
    reconstruction: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measures the quality of codes. The result is ready for JSON.

    Args:
      codes: int32 [N, L], before any disambiguating level.
      codebook_sizes: L sizes.
      embeddings: float32 [N, D], the quantized embeddings, if known.
      reconstruction: float32 [N, D], the embeddings decoded from the codes.

    Returns:
      num_items: N.
      levels: L.
      distinct_ids: the number of distinct IDs.
      collisions: N - distinct_ids.
      items_sharing: the number of items that share their ID with another item.
      collision_rate: items_sharing / N.
      largest_group: the most items with the same ID.
      codes_used: [L], the share of each level's codebook that is used.
      perplexity: [L], exp(entropy) of each level's codes. The best value is the codebook size.
      relative_mse: sum |x - reconstruction|^2 / sum |x - mean|^2; None without a reconstruction. 0 is exact, 1 is
        no better than the mean.
    """
    sizes = np.bincount(groups(codes))
    counts = [np.bincount(codes[:, level], minlength=size) for level, size in enumerate(codebook_sizes)]
    sharing = int(sizes[sizes > 1].sum())
    return {
        "num_items": len(codes),
        "levels": codes.shape[1],
        "distinct_ids": len(sizes),
        "collisions": len(codes) - len(sizes),
        "items_sharing": sharing,
        "collision_rate": sharing / len(codes),
        "largest_group": int(sizes.max()),
        "codes_used": [float((count > 0).mean()) for count in counts],
        "perplexity": [_perplexity(count) for count in counts],
        "relative_mse": None if reconstruction is None else _relative_mse(embeddings, reconstruction),
    }


def _perplexity(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _relative_mse(embeddings: np.ndarray, reconstruction: np.ndarray) -> float:
    error = np.square(embeddings - reconstruction, dtype=np.float64).sum()
    spread = np.square(embeddings - embeddings.mean(axis=0), dtype=np.float64).sum()
    return float(error / max(spread, np.finfo(np.float64).tiny))
