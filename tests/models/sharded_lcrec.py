"""Compares LC-Rec on a mesh of eight devices with the same model on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.sharded_lcrec

A separate program that `test_sharded_lcrec.py` runs; it fails if a loss, gradient, ranking or probability differs.
"""

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.inputs.prompts import token_prompt
from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.training import tiny_run

MESH = (2, 2, 2)
SIZES = (4, 5, 3)
NUM_ITEMS = 43
SHAPE = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24, "dropout": 0.3}


def semantic_ids() -> SemanticIds:
    """The IDs of 43 items; some have the same codes."""
    every = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    codes = np.random.default_rng(0).permutation(every)[:NUM_ITEMS]
    codes[[7, 40]], codes[22] = codes[1], codes[21]
    return SemanticIds(codes.astype(np.int32), SIZES)


def users() -> Sequences:
    rng = np.random.default_rng(1)
    return Sequences.from_lists(rng.integers(0, NUM_ITEMS, length) for length in (5, 6) * 16)


def train_batch(windows: str) -> TrainBatch:
    windows = TrainingWindows(users(), token_prompt(semantic_ids().tokens), 5, 40, windows)
    batches = train_batches(windows, 8, seed=0)
    batch = next(batches)
    batches.close()
    return batch


def rank_batch() -> RankBatch:
    rng = np.random.default_rng(2)
    items = rng.integers(0, NUM_ITEMS, (16, 4)).astype(np.int32)
    lengths = 3 * rng.integers(1, 5, 16).astype(np.int32)
    targets = np.array([1, 7, 40, 21, 22, 42, 0, *range(5, 14)], np.int32)
    return RankBatch(semantic_ids().tokens[items].reshape(16, -1), lengths, items, targets)


def answers() -> tuple:
    """The loss and its gradients, a ranking and probabilities."""
    config = tiny_run.config("lcrec")
    config.backbone.update(SHAPE)
    graphdef, params, rest = nnx.split(tiny_run.make_model(config, semantic_ids(), users()), nnx.Param, ...)

    @jax.jit
    def learn(params, batch):
        loss = lambda params: nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def rank(params, batch):
        model = nnx.merge(graphdef, params, rest)
        catalog = model.catalog()
        return model.rank(batch, catalog, 10, True), model.log_probabilities(batch, catalog)

    learned = learn(params, sharding.split_batch(train_batch("with_target")))
    return jax.device_get((learned, rank(params, sharding.split_batch(rank_batch()))))


def main() -> None:
    assert jax.device_count() == 8
    wanted = answers()  # Without a mesh: on one device.
    config = ml_collections.ConfigDict(dict(zip(sharding.AXES, MESH, strict=True)))
    with jax.set_mesh(sharding.make_mesh(config)):
        found = answers()
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=str(path))


if __name__ == "__main__":
    main()
