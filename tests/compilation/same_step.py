"""Checks that the step compiled in advance is the one used in training, on 8 devices.

    python -m tests.compilation.same_step

A separate program that `test_train_step.py` runs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from simgr_jax import default_config
from simgr_jax.compilation import train_step
from simgr_jax.compilation.train_step import PlannedRun
from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.huggingface.pretrained import load_pretrained, open_checkpoint
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.registry import create
from simgr_jax.models.scratch import scratch_backbone
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.state import create_state, make_train_step
from tests.huggingface.make_golden import GOLDEN

NUM_ITEMS = 60


def config(**backbone):
    tiny = default_config.get_config()
    tiny.data.max_items = 8
    tiny.semantic_ids.quantizer.update({"levels": 4, "codebook_size": 8})
    tiny.backbone.update(
        {"width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24, "dropout": 0.0}
        | backbone
    )
    tiny.training.update({"batch_rows": 8, "row_length": 32})
    return tiny


def llm_config(rank: int):
    tiny = default_config.get_config()
    tiny.backbone.checkpoint = str(GOLDEN / "qwen3")
    tiny.semantic_ids.quantizer.update({"levels": 4, "codebook_size": 8})
    tiny.simgr.history = "tokens"
    tiny.data.max_items = 8
    tiny.lora.rank = rank
    tiny.simgr.item_text = "read" if rank else "none"
    tiny.training.update({"batch_rows": 8, "row_length": 32, "ema_decay": 0.9})
    tiny.optimizer.accumulate_steps = 2
    return tiny


def actual_step(config, planned: PlannedRun) -> jax.stages.Lowered:
    """The step as `Run.model` and `training.loop.fit` make it, with real arrays."""
    items, prompt, rngs = planned.items, planned.prompt, nnx.Rngs(config.seed)

    def backbone():
        if not config.backbone.checkpoint:
            return scratch_backbone(config, rngs)
        return load_pretrained(open_checkpoint(config), None, config, items, prompt, planned.longest_sequence)

    readings = lambda: np.zeros((items.num_items, 16), np.float32)  # noqa: E731
    inputs = ModelInputs(items.num_items, items.semantic_ids, Sequences.from_lists([]), backbone, rngs, readings)
    graphdef, params, rest = nnx.split(create(config, inputs), nnx.Param, ...)
    windows = TrainingWindows(Sequences.from_lists([[0, 1]]), prompt, config.data.max_items, planned.row_length)
    optimizer = optimizers.create(config, 1000 * config.optimizer.accumulate_steps)
    state = create_state(params, optimizer, config.training.ema_decay)
    step = make_train_step(graphdef, optimizer, config.training.ema_decay, config.seed, state)
    return step.lower(state, rest, sharding.batch_like(windows.batch_like(config.training.batch_rows)))


def compare(config, folder: Path) -> None:
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    planned_config = config.copy_and_resolve_references()
    if config.backbone.checkpoint:  # The folder has no weights.
        shutil.copy(Path(config.backbone.checkpoint) / "config.json", folder)
        planned_config.backbone.checkpoint = str(folder)
    planned = PlannedRun(planned_config, folder, NUM_ITEMS)
    with planned.mesh():
        assert train_step.lower(planned).as_text() == actual_step(config, planned).as_text()


if __name__ == "__main__":
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as folder:
        for case in (config(), llm_config(rank=0), llm_config(rank=2)):
            compare(case, Path(folder))
    print("same")
