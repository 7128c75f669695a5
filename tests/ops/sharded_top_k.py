"""Compares the ranking of a catalog split across 8 devices with one device's.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.ops.sharded_top_k

A separate program that `test_top_k.py` runs; it fails if they differ.
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from simgr_jax.devices import sharding
from simgr_jax.ops.top_k import rank_catalog


def check(items_a_device: int, k: int) -> None:
    """The catalog's last column is padding."""
    rng = np.random.default_rng(k)
    # Few distinct values, so that many scores tie.
    scores = rng.integers(0, 5, (6, 8 * items_a_device)).astype(np.float32)
    targets = rng.integers(0, scores.shape[1] - 1, 6).astype(np.int32)
    rank = lambda scores, targets: rank_catalog(scores, targets, k, scores.shape[1] * parts - 1)  # noqa: E731
    parts = 1
    expected = rank(scores, targets)
    parts = 8
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})):
        split = sharding.per_device(rank, (P(None, sharding.RULES["items"]), P()), P(), check_vma=False)
        found = jax.jit(split)(scores, targets)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


if __name__ == "__main__":
    # Each device has fewer items than the list, as many, or more; also, all items together just fill the list.
    for items_a_device, k in ((3, 5), (4, 4), (6, 4), (1, 8), (2, 16), (2, 15)):
        check(items_a_device, k)
