"""The training loop, for any recommender."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.devices import distributed, sharding
from simgr_jax.errors import Stopped, UserError
from simgr_jax.evaluation.metrics import SELECTION_METRIC
from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.models import registry
from simgr_jax.models.model_inputs import Memory
from simgr_jax.models.recommender import Recommender
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training import steps
from simgr_jax.training.checkpoints import Checkpoints, Progress
from simgr_jax.training.metric_writer import MetricWriter
from simgr_jax.training.progress_line import ProgressLine
from simgr_jax.training.reread import make_reread
from simgr_jax.training.standardize import standardize
from simgr_jax.training.state import create_state, make_train_step
from simgr_jax.training.stop_request import StopRequest

# The host prepares this many steps ahead of the device. More would only delay a request to stop.
STEPS_AHEAD = 4
# With fewer updates an LLM hardly learns (docs/llm_training.md).
FEW_UPDATES = 50


class _StepTimer:
    """Counts the targets trained and the seconds spent on training steps, without evaluations."""

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


class _BadSteps:
    """Counts the steps that were skipped because their loss or gradient was not finite."""

    def __init__(self, most: int):
        """most: as many in a row are too many."""
        self.in_a_row, self.too_many = 0, False
        self._most = most

    def count(self, are_finite: Iterable[bool]) -> None:
        for is_finite in are_finite:
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            self.too_many |= self.in_a_row >= self._most


def fit(
    model: Recommender,
    windows: TrainingWindows,
    validate: Callable[[Recommender], dict[str, float]],
    config: ml_collections.ConfigDict,
    workdir: Path,
    line: ProgressLine,
) -> None:
    """Trains `model`, continuing from the workdir's latest checkpoint if there is one.

    Writes `workdir/checkpoints` (the latest, and the best by validation NDCG@10), `metrics.jsonl` and TensorBoard
    events. The model can't be used afterwards, because the first step reuses its parameters' buffers.

    Args:
      windows: the training windows.
      validate: maps a model to the metrics of the validation split.
      config: `training`, `optimizer` and `seed` are read.
      line: shows what training does.

    Raises:
      UserError: the losses or gradients of `training.max_bad_steps` steps in a row, or of the last two, are not finite;
        or the batches can't be made.
      Stopped: a signal asked the run to stop; its last step is saved, unless that was skipped.
    """
    began, training = time.monotonic(), config.training
    rows = training.batch_rows
    steps_per_epoch = steps.steps_per_epoch(windows, rows)
    num_steps = training.epochs * steps_per_epoch
    evaluate_every = training.evaluate_every_epochs * steps_per_epoch
    checkpoint_every = training.checkpoint_every_steps
    frozen_steps = optimizers.frozen_steps(config, steps_per_epoch)

    optimizer = optimizers.create(config, steps_per_epoch)
    batch_like = sharding.batch_like(windows.batch_like(rows))
    part = distributed.input_part(batch_like.inputs.sharding, rows)
    make_batches = partial(train_batches, windows, rows, config.seed, streams=training.input_streams, part=part)
    batches = make_batches()
    progress = Progress()
    # The batches are always closed, because the interpreter aborts if a prefetching thread outlives it. The request to
    # stop comes before the checkpoints, because it may arrive while the last one is written.
    with closing(batches), StopRequest() as stop, Checkpoints(workdir / "checkpoints") as checkpoints:
        if (checkpoints.latest_step or 0) < num_steps:
            _warn_of_few_updates(num_steps // config.optimizer.accumulate_steps, config)
            batch = f"{rows} rows of {windows.row_length} positions"
            dtype = f", computed in {config.backbone.dtype}" if registry.has_checkpoint(config) else ""
            epochs = "1 epoch" if training.epochs == 1 else f"{training.epochs} epochs"
            line.say(f"{epochs} of {steps_per_epoch} steps, each of {batch}{dtype}")
        if checkpoints.latest_step is None:
            with line.doing("standardizing the readout"):
                standardize(model, make_batches)
        graphdef, params, memory, rest = nnx.split(model, nnx.Param, Memory, ...)
        state, reread = create_state(params, optimizer, training.ema_decay, memory), make_reread(graphdef)
        if checkpoints.latest_step is not None:
            # Frees the initial values, because there may be no room for two states.
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            state, progress = checkpoints.restore_latest(state)
            if state.step < num_steps:
                line.say(f"continuing after step {int(state.step)} of {num_steps}")
            batches.set_state(progress.input)
        began -= progress.seconds

        def compiled(frozen: bool) -> jax.stages.Compiled:
            optimizer = optimizers.create(config, steps_per_epoch, frozen)
            parts = optimizers.pretrained_parts(config) if frozen else ()
            train_step = make_train_step(graphdef, optimizer, training.ema_decay, config.seed, state, parts)
            return train_step.lower(state, rest, batch_like).compile()

        step, pending = int(state.step), []
        # Compiled ahead of time, so that the loop can't compile: a batch of another shape is an error.
        with line.doing("compiling the training step"):
            train_steps = {frozen: compiled(frozen) for frozen in _phases(step, frozen_steps, num_steps)}
        if step < frozen_steps:
            line.say(f"what is pretrained is frozen in the first {min(frozen_steps, num_steps)} of {num_steps} steps")
        timer = _StepTimer(progress.step_seconds, progress.targets)
        bad_steps = _BadSteps(training.max_bad_steps)
        with MetricWriter(workdir, step) as writer:
            stop.listen()
            timer.start()
            line.begin(step, num_steps, steps_per_epoch, evaluate_every)
            while step < num_steps and progress.since_best < training.patience:
                train_step = train_steps[step < frozen_steps]
                state, scalars = train_step(state, rest, sharding.join_batch(next(batches)))
                step += 1
                pending.append(scalars)
                line.started(step, scalars)
                if len(pending) > STEPS_AHEAD:
                    jax.block_until_ready(pending[-1 - STEPS_AHEAD])

                evaluates = step % evaluate_every == 0 or step == num_steps
                stops = stop.at(step, state)
                saves = evaluates or stops or (checkpoint_every and step % checkpoint_every == 0)
                if saves or (step % training.log_every_steps == 0 and len(pending) > 1):
                    # Leaves out the newest step, so that the device has work while the host reads the finished ones.
                    # Before a checkpoint reads them all, to know whether the newest is bad.
                    finished, pending = (pending, []) if saves else (pending[:-1], pending[-1:])
                    finished = jax.device_get(finished)
                    good = [scalars for scalars in finished if scalars["is_finite"]]
                    bad_steps.count(scalars["is_finite"] for scalars in finished)
                    timer.targets += sum(int(scalars["targets"]) for scalars in good)
                    scalars = _means(good) | {"bad_steps": len(finished) - len(good)}
                    scalars |= {"targets_per_second": timer.lap()}
                    writer.write(step, {f"train/{name}": value for name, value in scalars.items()})
                    line.show()
                    if len(good) < len(finished):
                        skipped = f"{len(finished) - len(good)} of the last {len(finished)} steps were skipped"
                        reason = "their loss or gradient was not finite"
                        distributed.warn(__name__, f"step {step}: {skipped}, because {reason}")
                    # With two at the end, the parameters that would be kept are probably ruined.
                    ends_badly = step == num_steps and bad_steps.in_a_row > 1
                    if bad_steps.too_many or ends_badly:
                        count = bad_steps.in_a_row if ends_badly else training.max_bad_steps
                        raise _diverged(count, step, workdir, checkpoints.latest_step)

                if saves and bad_steps.in_a_row and step < num_steps:
                    # The step before the bad ones may have ruined the parameters.
                    distributed.warn(
                        __name__,
                        f"step {step}: no checkpoint, because this step was skipped; the next one is tried again",
                    )
                elif saves:
                    jax.block_until_ready(state)
                    timer.stop()
                    metrics = None
                    if evaluates:
                        with line.doing("validating"):
                            state = state._replace(memory=reread(state.evaluation_params, state.memory, rest))
                            model = nnx.merge(graphdef, state.evaluation_params, state.memory, rest)
                            metrics = validate(model)
                        writer.write(step, {f"validation/{name}": value for name, value in metrics.items()})
                        line.validated(step, metrics)
                        progress = progress.after_evaluation(metrics[SELECTION_METRIC])
                    progress = progress._replace(
                        seconds=time.monotonic() - began,
                        step_seconds=timer.seconds,
                        targets=timer.targets,
                        input=batches.get_state(),
                    )
                    writer.require_written()
                    checkpoints.save(state, progress, metrics)
                    timer.start()
                if stops:
                    break
        saved = checkpoints.latest_step
    if stop.made:
        kept = "which is saved" if saved == step else f"of which step {saved or 'none'} is saved"
        raise Stopped(f"stopped after step {step} of {num_steps}, {kept}")


def check_longer(
    windows: TrainingWindows, config: ml_collections.ConfigDict, workdir: Path, *, new_restart: bool
) -> None:
    """Checks that a longer `config` makes the workdir's run go on. All processes must call it.

    Args:
      new_restart: whether `optimizer.restart_epoch` differs from that of the run so far.

    Raises:
      UserError: the run stopped by `training.patience`, which is too low still; or the run is already beyond the epoch
        of its new restart.
    """
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step
        since_best = 0 if step is None else checkpoints.latest_progress().since_best
    if since_best >= config.training.patience:
        raise UserError(
            f"config.training.patience: the run here stopped at step {step}, because validation had not got better; "
            f"raise it above {since_best} to go on"
        )
    restart = config.optimizer.restart_epoch
    steps_per_epoch = steps.steps_per_epoch(windows, config.training.batch_rows)
    if new_restart and 0 < restart * steps_per_epoch < (step or 0):
        reached = -(-step // steps_per_epoch)
        raise UserError(
            f"config.optimizer.restart_epoch: the run here is in or at the end of epoch {reached}, too late to restart "
            f"after epoch {restart}; give {reached} or more, or 0 for no restart"
        )


def _warn_of_few_updates(updates: int, config: ml_collections.ConfigDict) -> None:
    if updates < FEW_UPDATES and registry.has_checkpoint(config):
        distributed.warn(
            __name__,
            f"config.training.epochs: {updates} updates are few for an LLM: the learning rate falls before it has "
            "learned much; raise epochs, or lower config.training.batch_rows",
        )


def _phases(step: int, frozen_steps: int, num_steps: int) -> list[bool]:
    """Whether the backbone is frozen, in each phase of the steps that are left after `step`."""
    return [True] * (step < frozen_steps) + [False] * (max(step, frozen_steps) < num_steps)


def _means(scalars: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The mean of each scalar over steps, without those that count or flag; nothing for no steps."""
    names = [name for name in scalars[0] if name not in ("targets", "is_finite")] if scalars else []
    return {name: float(np.mean([one[name] for one in scalars])) for name in names}


def _diverged(count: int, step: int, workdir: Path, latest: int | None) -> UserError:
    kept = "there is no checkpoint"
    if latest is not None:
        kept = f"the latest checkpoint is {workdir / 'checkpoints' / str(latest)}, whose own step was finite"
    return UserError(
        f"config.optimizer.learning_rate: the loss or its gradient was not finite in {count} steps in a row, before "
        f"step {step + 1}, so training stops; {kept}; lower the learning rate or raise the model's temperature, and "
        "train in a new workdir"
    )
