"""The training loop: any recommender, one config, one workdir."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax import distributed, sharding
from simgr_jax.data.batches import TrainingWindows, train_batches
from simgr_jax.data.dataset import Split
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.evaluation.metrics import summarize
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.models.recommender import Recommender
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.checkpoints import SELECTION_METRIC, Checkpoints
from simgr_jax.training.metric_writer import MetricWriter
from simgr_jax.training.state import create_state, make_train_step


class _StepTimer:
    """Counts the targets trained and the seconds spent on training steps, evaluations left out."""

    def __init__(self, seconds: float, targets: int):
        self.seconds, self.targets = seconds, targets
        self._since: float | None = None
        self._lap = (seconds, targets)

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def lap(self) -> float:
        """Targets per second since the last lap."""
        self.stop()
        seconds, targets = self.seconds - self._lap[0], self.targets - self._lap[1]
        self._lap = (self.seconds, self.targets)
        self.start()
        return targets / seconds


def fit(
    model: Recommender, split: Split, prompt: Prompt, config: ml_collections.ConfigDict, ranker: Ranker, workdir: Path
) -> None:
    """Trains `model` on `split.train`, going on from the workdir's latest checkpoint where there is one.

    Leaves `workdir/checkpoints` (the latest, and the best by validation NDCG@10), `metrics.jsonl` and TensorBoard
    events. The model's own parameters are used up: their buffers become the first step's. A model without parameters is
    left as it is.

    Raises:
      UserError: nothing to train on, or a loss or gradient that is not finite.
    """
    began, training = time.monotonic(), config.training
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if not params:
        return

    windows = TrainingWindows(split.train, prompt, config.data.max_items, training.row_length, model.windows)
    if not len(windows):
        raise UserError(
            "config.data.split: leaves no training sequence of two items; give users with more interactions"
        )
    # Rows are never quite full, so what is called an epoch here shows a little less than every target.
    steps_per_epoch = -(-windows.num_inputs // (training.batch_rows * training.row_length))
    num_steps = training.epochs * steps_per_epoch
    evaluate_every = training.evaluate_every_epochs * steps_per_epoch

    optimizer = optimizers.create(config.optimizer, num_steps)
    state = create_state(params, optimizer, training.ema_decay)
    batch_like = sharding.batch_like(windows.batch_like(training.batch_rows))
    part = distributed.input_part(batch_like.inputs.sharding, training.batch_rows)
    batches = train_batches(windows, training.batch_rows, config.seed, streams=training.input_streams, part=part)
    progress: dict[str, Any] = {"best": -1.0, "since_best": 0, "seconds": 0.0, "step_seconds": 0.0, "targets": 0}
    # Closed whatever happens: the interpreter aborts where a prefetching thread outlives it.
    with closing(batches), Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest_step is not None:
            # Their values are not asked for, and there need not be room for two states.
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            state, progress = checkpoints.restore_latest(state)
            batches.set_state(progress["input"])
        began -= progress["seconds"]

        # Compiled ahead, so that no step of the loop can ever compile: a batch of another shape would be an error.
        train_step = make_train_step(graphdef, optimizer, training.ema_decay, config.seed, state)
        train_step = train_step.lower(state, rest, batch_like).compile()

        step, pending = int(state.step), []
        timer = _StepTimer(progress["step_seconds"], progress["targets"])
        with MetricWriter(workdir, num_steps, step) as writer:
            timer.start()
            while step < num_steps and progress["since_best"] < training.patience:
                state, scalars = train_step(state, rest, sharding.join_batch(next(batches)))
                step += 1
                pending.append(scalars)

                evaluates = step % evaluate_every == 0 or step == num_steps
                saves = evaluates or (training.checkpoint_every_steps and step % training.checkpoint_every_steps == 0)
                if saves or (step % training.log_every_steps == 0 and len(pending) > 1):
                    # All but the newest: the device still has a step to do while the host reads the finished ones.
                    # Before a checkpoint, all: none is taken of a run that has diverged.
                    finished, pending = (pending, []) if saves else (pending[:-1], pending[-1:])
                    finished = jax.device_get(finished)
                    timer.targets += sum(int(scalars.pop("targets")) for scalars in finished)
                    scalars = _finite_means(finished, step) | {"targets_per_second": timer.lap()}
                    writer.write(step, {f"train/{name}": value for name, value in scalars.items()})

                if saves:
                    jax.block_until_ready(state)
                    timer.stop()
                    metrics = None
                    if evaluates:
                        ranking = ranker(state.evaluation_params, rest, split.validation)
                        metrics = summarize(ranking.target_rank, ranking.items, model.num_items)
                        writer.write(step, {f"validation/{name}": value for name, value in metrics.items()})
                        score = metrics[SELECTION_METRIC]
                        since_best = 0 if score > progress["best"] else progress["since_best"] + 1
                        progress |= {"best": max(progress["best"], score), "since_best": since_best}
                    progress |= {
                        "seconds": time.monotonic() - began,
                        "step_seconds": timer.seconds,
                        "targets": timer.targets,
                        "input": batches.get_state(),
                    }
                    # A copy, because it is written while the loop goes on.
                    checkpoints.save(state, dict(progress), metrics)
                    timer.start()


def _finite_means(scalars: list[dict[str, np.ndarray]], step: int) -> dict[str, float]:
    """The mean of each scalar over steps; a loss or gradient that is not finite ends the run."""
    means = {name: float(np.mean([one[name] for one in scalars])) for name in scalars[0]}
    if not np.isfinite([means["loss"], means["gradient_norm"]]).all():
        raise UserError(
            f"config.optimizer.learning_rate: the loss was not finite, or its gradient, before step {step + 1}; "
            "lower it or raise config.model.temperature, and train in a new workdir"
        )
    return means
