"""Items that share a semantic ID."""

from __future__ import annotations

import numpy as np


def groups(codes: np.ndarray) -> np.ndarray:
    """codes int32 [N, L] -> int32 [N]: numbers the distinct IDs 0, 1, 2, ... in sorted order."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    return group.reshape(-1).astype(np.int32)


def add_disambiguating_level(codes: np.ndarray, codebook_sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Makes IDs unique with one more level, which numbers the items that share an ID 0, 1, 2, ... in item order (TIGER,
    arXiv 2305.05065, section 3.1).

    Args:
      codes: int32 [N, L].
      codebook_sizes: L sizes.

    Returns:
      codes int32 [N, L + 1] and L + 1 sizes. The last size is that of the largest group.
    """
    group = groups(codes)
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    place = np.empty(len(codes), np.int32)
    place[order] = np.arange(len(codes)) - np.repeat(starts, counts)
    return np.column_stack([codes, place]).astype(np.int32), (*codebook_sizes, int(counts.max(initial=1)))
