"""Time of a train step over ten million items, and the peak memory of the whole process.

    python -m benchmarks.many_items

The model is the default one with width 256 and a catalog chunk chosen by memory. The items' codes are random. A batch
is 8 rows of 64 items. Writes results/many_items.json.
"""

from __future__ import annotations

import resource
import time

import jax
import numpy as np
from flax import nnx

from benchmarks import record
from simgr_jax import default_config
from simgr_jax.data.dataset import Sequences
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.registry import create
from simgr_jax.models.scratch import scratch_backbone
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.state import create_state, make_train_step

ITEMS, LEVELS, CODES = 10_000_000, 4, 256
ROWS, LENGTH = 8, 64
STEPS, SEED = 2, 0


def make_batch(rng: np.random.Generator) -> TrainBatch:
    """One user per row, with a target at every position."""
    items = rng.integers(0, ITEMS, (ROWS, LENGTH + 1), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    valid = np.ones((ROWS, LENGTH), bool)
    return TrainBatch(items[:, :-1], np.ones_like(positions), positions, positions, items[:, :-1], items[:, 1:], valid)


def main() -> None:
    rng = np.random.default_rng(SEED)
    config = default_config.get_config()
    config.backbone.update({"width": 256, "head_width": 64, "dropout": 0.0})
    config.training.update({"batch_rows": ROWS, "row_length": LENGTH})
    semantic_ids = SemanticIds(rng.integers(0, CODES, (ITEMS, LEVELS), np.int32), (CODES,) * LEVELS)
    rngs = nnx.Rngs(config.seed)
    nobody = Sequences.from_lists([])
    model = create(config, ModelInputs(ITEMS, semantic_ids, nobody, lambda: scratch_backbone(config, rngs), rngs))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optimizers.create(config, steps_per_epoch=1000)
    state = create_state(params, optimizer, 0.0)
    batch = make_batch(rng)
    step = make_train_step(graphdef, optimizer, 0.0, SEED, state).lower(state, rest, batch).compile()

    seconds, losses = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        state, scalars = step(state, rest, batch)
        losses.append(round(float(jax.block_until_ready(scalars["loss"])), 4))
        seconds.append(round(time.perf_counter() - began, 1))
        print(f"loss {losses[-1]}, {seconds[-1]} s", flush=True)
    figures = {
        "items": ITEMS,
        "targets_per_step": ROWS * LENGTH,
        "step_seconds": seconds,
        "losses": losses,
        "temporary_mib": round(step.memory_analysis().temp_size_in_bytes / 2**20),
        "peak_process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(figures)
    record.write("many_items", figures, record.settings(config), SEED)


if __name__ == "__main__":
    main()
