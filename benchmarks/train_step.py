"""Train steps as `simgr_jax.train` runs them, to be timed."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.data.batches import TrainingWindows, train_batches
from simgr_jax.preparation import Prepared, prepare
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.state import create_state, make_train_step


def prepare_run(config: ml_collections.ConfigDict) -> Prepared:
    """The data and model of `config`; what is prepared is kept in workdirs/benchmarks."""
    return prepare(config, Path("workdirs/benchmarks"))


class TimedTraining:
    """A model in training, one batch shape; `run` goes on where the last call stopped."""

    def __init__(
        self,
        prepared: Prepared,
        config: ml_collections.ConfigDict,
        rows: int,
        row_length: int,
        max_sequences_per_row: int | None = None,
    ):
        graphdef, params, self._rest = nnx.split(prepared.model, nnx.Param, ...)
        optimizer = optimizers.create(config.optimizer, num_steps=1000)
        # Copied, because the step reuses the buffers of its state and the model may serve several of these objects.
        self._state = create_state(jax.tree.map(lambda x: x.copy(), params), optimizer, config.training.ema_decay)
        self._step = make_train_step(graphdef, optimizer, config.training.ema_decay, config.seed, self._state)
        windows = TrainingWindows(
            prepared.split.train, prepared.prompt, config.data.max_items, row_length, prepared.model.windows
        )
        self.max_targets = rows * windows.max_readouts  # Of a batch.
        self._batches = train_batches(windows, rows, config.seed, max_sequences_per_row)
        self.run(2)  # Compiles.

    def run(self, steps: int) -> tuple[int, float]:
        """Trains `steps` batches; returns the targets they held and the seconds they took."""
        began, targets = time.perf_counter(), 0
        for _ in range(steps):
            batch = next(self._batches)
            self._state, _ = self._step(self._state, self._rest, batch)
            targets += int(np.count_nonzero(batch.valid))
        jax.block_until_ready(self._state)
        return targets, time.perf_counter() - began
