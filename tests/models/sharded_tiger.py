"""Compares TIGER on a mesh of eight devices with the same model on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.sharded_tiger

A separate program that `test_sharded_tiger.py` runs; it fails if a loss, gradient or ranking differs, or if beam search
gathers the rows of several devices.
"""

import re

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.ops.top_k import Ranking
from tests.models.test_tiger import IDS, NUM_ITEMS, rank_batch, run_config, train_batch
from tests.training import tiny_run

SHAPE = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24}
USERS = [np.random.default_rng(user).integers(0, NUM_ITEMS, 3 + user % 4) for user in range(8)]
K = 5


def run(mesh: jax.sharding.Mesh) -> tuple[float, float, Ranking]:
    """The loss, the norm of its gradient, and the ranking."""
    with jax.set_mesh(mesh):
        model = tiny_run.make_model(run_config("causal", **SHAPE), IDS, Sequences.from_lists([]))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, batch):
            return nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))[0]

        def rank(params, batch):
            model = nnx.merge(graphdef, params, rest)
            return model.rank(batch, model.catalog(), K, filter_history=True)

        batch = sharding.split_batch(train_batch(model, [[user] for user in USERS]))
        value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
        norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(gradients)))
        batch = sharding.split_batch(rank_batch(USERS))
        rank = jax.jit(rank).lower(params, batch).compile()
        if mesh.size > 1:
            check_gathers(rank.as_text())
        return float(value), float(norm), jax.tree.map(np.asarray, rank(params, batch))


def check_gathers(text: str) -> None:
    """Parameters are gathered, but no array with a row per user is."""
    shapes = re.findall(r"= \w+\[([0-9,]+)\]\S* all-gather\(", text)
    assert shapes and not any(shape.split(",")[0] == str(len(USERS)) for shape in shapes), shapes


def main() -> None:
    loss, norm, ranking = run(sharding.one_device())
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    on_mesh = run(mesh)
    np.testing.assert_allclose(on_mesh[:2], (loss, norm), rtol=1e-4)
    np.testing.assert_array_equal(on_mesh[2].items, ranking.items)
    np.testing.assert_allclose(on_mesh[2].scores, ranking.scores, rtol=1e-4)


if __name__ == "__main__":
    main()
