"""Compiles functions for 8 devices and prints their modules' costs. A separate program that `test_cost.py` runs.

    python -m tests.compilation.modules cpu:8

A TPU topology, e.g. v5e:2x4, needs libtpu.
"""

import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from simgr_jax.compilation.cost import cost
from simgr_jax.compilation.topology import open_topology

L, B, D, F = 3, 64, 128, 256


def layers(weights, x, remat=False):
    def layer(x, weights):
        return jnp.tanh(x @ weights[0]) @ weights[1], None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0]


def loss(weights, x, remat):
    return jnp.sum(layers(weights, x, remat) ** 2)


def talk(x):
    """Runs each kind of collective among 2, 4 or 8 devices in every iteration of a loop; x: [8, 128] on each."""

    def turn(x, _):
        gathered = jax.lax.all_gather(x, "four", tiled=True)
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "four", tiled=True)
        moved = jax.lax.ppermute(scattered, "two", [(0, 1), (1, 0)])
        exchanged = jax.lax.all_to_all(jnp.sin(moved), "four", 0, 0, tiled=True)
        return jnp.cos(jax.lax.psum(jnp.sin(exchanged), ("four", "two"))), None

    return jax.lax.scan(turn, x, length=5)[0]


def main(topology: str) -> None:
    devices = open_topology(topology).devices
    mesh = jax.make_mesh((4, 2), ("four", "two"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)
    array = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))  # noqa: E731
    weights = array((L, D, F)), array((L, F, D))
    shared_weights = array((L, D, F), None, None, "two"), array((L, F, D), None, "two")
    rows = array((B, D), "four")
    by_device = jax.shard_map(talk, in_specs=P("four"), out_specs=P("four"), check_vma=False)
    functions: dict[str, tuple[Callable, tuple]] = {
        "forward": (layers, (weights, rows)),
        "gradient": (jax.grad(lambda weights, x: loss(weights, x, False)), (weights, rows)),
        "recomputed": (jax.grad(lambda weights, x: loss(weights, x, True)), (weights, rows)),
        "tensor_parallel": (layers, (shared_weights, rows)),
        "collectives": (by_device, (array((32, 128), "four"),)),
    }
    costs = {}
    with jax.set_mesh(mesh):
        for name, (function, arguments) in functions.items():
            found = cost(jax.jit(function).lower(*arguments).compile().as_text())
            costs[name] = {
                "flops": found.flops,
                "memory_bytes": found.memory_bytes,
                "collectives": found.collectives,
                "uncounted": found.uncounted,
            }
    print(json.dumps(costs))


if __name__ == "__main__":
    main(sys.argv[1])
