"""Runs the train steps of `simgr_jax.train` for timing."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.run import Run
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.state import create_state, make_train_step


def prepare_run(config: ml_collections.ConfigDict) -> Run:
    """The run of `config`, whose data are prepared in workdirs/benchmarks."""
    return Run(config, Path("workdirs/benchmarks"))


class TimedTraining:
    """A model in training with one batch shape. Each call of `run` continues the training."""

    def __init__(self, run: Run, rows: int, row_length: int, max_sequences_per_row: int | None = None):
        config = run.config
        graphdef, params, self._rest = nnx.split(run.model, nnx.Param, ...)
        optimizer = optimizers.create(config, steps_per_epoch=1000)
        # Copied because the step reuses its state's buffers, and several of these objects may share the model.
        self._state = create_state(jax.tree.map(lambda x: x.copy(), params), optimizer, config.training.ema_decay)
        self._step = make_train_step(graphdef, optimizer, config.training.ema_decay, config.seed, self._state)
        windows = TrainingWindows(run.split.train, run.prompt, config.data.max_items, row_length, run.options.windows)
        self.max_targets = rows * windows.max_readouts  # Per batch.
        self._batches = train_batches(windows, rows, config.seed, max_sequences_per_row)
        self.run(2)  # Compiles the step.

    def run(self, steps: int) -> tuple[int, float]:
        """Trains `steps` batches; returns the number of targets and the seconds taken."""
        began, targets = time.perf_counter(), 0
        for _ in range(steps):
            batch = next(self._batches)
            self._state, _ = self._step(self._state, self._rest, batch)
            targets += int(np.count_nonzero(batch.valid))
        jax.block_until_ready(self._state)
        return targets, time.perf_counter() - began
