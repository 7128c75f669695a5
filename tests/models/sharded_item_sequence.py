"""Compares models that read items, all but SimGR, on a mesh of eight devices with the same models on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.sharded_item_sequence

A separate program that `test_item_sequence.py` runs; it fails if a loss, gradient, ranking or probability differs.
"""

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.training import tiny_run

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
NUM_ITEMS, CODEBOOKS = 43, (4, 4, 3)
SHAPE = {"width": 16, "layers": 1, "heads": 4, "head_width": 8, "mlp_width": 24, "dropout": 0.3}
# (model, its options)
CASES = (
    ("gru4rec", {}),
    ("bert4rec", {}),
    ("hstu", {}),
    ("item_knn", {"neighbors": 7}),
    ("rpg", {"decoding": "exhaustive"}),
    ("rpg", {"decoding": "graph", "graph_neighbors": 4, "beam_width": 5}),
)


def make(name: str, options: dict):
    config = tiny_run.config(name, row_length=5)
    config.data.max_items = 5
    config.backbone.update(SHAPE)
    if options:
        config[name].update(options)
    codes = np.stack(np.unravel_index(np.arange(NUM_ITEMS), CODEBOOKS), axis=1)
    ids = SemanticIds(codes.astype(np.int32), CODEBOOKS)
    users = Sequences.from_lists(np.random.default_rng(3).integers(0, NUM_ITEMS, (20, 6)))
    return tiny_run.make_model(config, ids, users)


def train_batch() -> TrainBatch:
    """Eight rows with two users each, whose items are random."""
    items = np.random.default_rng(1).integers(0, NUM_ITEMS, (8, 6))
    rows = [[1, 1, 1, 2, 2]] * 8, [[0, 1, 2, 0, 1]] * 8, [[0, 1, 2, 3, 4]] * 8
    as_int = lambda x: np.asarray(x, np.int32)  # noqa: E731
    return TrainBatch(*map(as_int, (items[:, :5], *rows, items[:, :5], items[:, 1:])), np.full((8, 5), True))


def rank_batch() -> RankBatch:
    rng = np.random.default_rng(2)
    items = rng.integers(0, NUM_ITEMS, (16, 5)).astype(np.int32)
    lengths = rng.integers(1, 6, 16).astype(np.int32)
    history = np.where(np.arange(5) < lengths[:, None], items, -1)
    return RankBatch(items, lengths, history, rng.integers(0, NUM_ITEMS, 16).astype(np.int32))


def answers(name: str, options: dict) -> tuple:
    """The loss and its gradients, if the model is trained; the ranking and the probabilities."""
    graphdef, params, rest = nnx.split(make(name, options), nnx.Param, ...)
    train, cases = sharding.split_batch(train_batch()), sharding.split_batch(rank_batch())

    def loss(params):
        return nnx.merge(graphdef, params, rest).loss(train, nnx.Rngs(dropout=1, negatives=2))[0]

    def rank(params):
        model = nnx.merge(graphdef, params, rest)
        catalog = model.catalog()
        probabilities = model.log_probabilities(cases, catalog) if params else None
        return model.rank(cases, catalog, 10, True), probabilities

    learned = jax.jit(jax.value_and_grad(loss))(params) if params else None
    return jax.device_get((learned, jax.jit(rank)(params)))


def assert_same(found, wanted) -> None:
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        # The gradient of a key's bias is zero except for rounding, so it has no size of its own.
        largest = max(np.abs(expected).max(initial=0, where=np.isfinite(expected)), 1e-3)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * largest, err_msg=str(path))


def main() -> None:
    assert jax.device_count() == 8
    for case in CASES:
        wanted = answers(*case)  # Without a mesh: on one device.
        with jax.set_mesh(sharding.make_mesh(ml_collections.ConfigDict(MESH))):
            found = answers(*case)
        assert_same(found, wanted)


if __name__ == "__main__":
    main()
