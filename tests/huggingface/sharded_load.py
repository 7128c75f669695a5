"""Loads a checkpoint onto the devices of several processes. A separate program that `test_load_weights.py` runs.

    python -m tests.huggingface.sharded_load FOLDER SHARDING PORT PROCESSES RANK

SHARDING is "fsdp" (one axis of each kernel is split in four) or "all" (as many axes as possible are split).

Fails if a device's shard differs from the same shard of an unsharded load. Prints the number of bytes read, as JSON.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.load_weights import load_transformer


def spec_of(sharding: str, shape: tuple[int, ...]) -> P:
    """A parameter's sharding over a mesh of 4 × 2."""
    if len(shape) < 3:  # The norms.
        return P()
    if sharding == "fsdp":  # Each shard is on two devices.
        return P(*(None,) * (len(shape) - 2), "first")
    if len(shape) == 4:  # Experts.
        return P(None, "first", None, "second")
    return P(*(None,) * (len(shape) - 2), "first", "second")


def main(folder: str, sharding: str, port: str, processes: str, rank: str) -> None:
    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank))
    assert jax.device_count() == 8
    # Test both kinds of meshes. Explicit is jax.make_mesh's default.
    kind = AxisType.Explicit if sharding == "fsdp" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("first", "second"), axis_types=(kind, kind))

    def shardings(variable):
        return NamedSharding(mesh, spec_of(sharding, variable.get_value().shape))

    checkpoint = Checkpoint(Path(folder))
    config = families.transformer_config(checkpoint.config, max_length=16)
    whole = nnx.to_flat_state(nnx.state(load_transformer(checkpoint, config, "float32")))

    sizes, read = [], Checkpoint.read
    Checkpoint.read = lambda *args: sizes.append((x := read(*args)).nbytes) or x
    sharded = nnx.to_flat_state(nnx.state(load_transformer(checkpoint, config, "float32", shardings)))

    pairs = [(a.get_value(), b.get_value()) for (_, a), (_, b) in zip(whole, sharded, strict=True)]
    for unsharded, array in pairs:
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(unsharded)[shard.index])
    cut = sum(not array.sharding.is_fully_replicated for _, array in pairs)
    print(json.dumps({"bytes_read": sum(sizes), "sharded_parameters": cut}))


if __name__ == "__main__":
    main(*sys.argv[1:])
