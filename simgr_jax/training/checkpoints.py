"""Orbax checkpoints of a run: the latest, to continue from, and the best by validation NDCG@10, to keep."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from simgr_jax.devices import distributed
from simgr_jax.errors import UserError, first_line
from simgr_jax.evaluation.metrics import SELECTION_METRIC
from simgr_jax.training.state import TrainState
from simgr_jax.workdir import digests
from simgr_jax.workdir.read_files import read_json_object

# Where training puts damaged checkpoints, beside the folder of the others.
DAMAGED_FOLDER = "damaged_checkpoints"
_METRICS = "metrics"
# Where Orbax moves a checkpoint that is not kept any more. It is removed from there, so that a run that is killed
# meanwhile leaves no half of a checkpoint under its step.
_REMOVED_FOLDER = ".removed"
# Orbax adds the time to it when it renames the folder. Nothing of it is read that could change what is restored.
_COMMITTED = "_CHECKPOINT_METADATA"


class Progress(NamedTuple):
    """How far training has come, beyond what `TrainState` holds.

    Attributes:
      best: the best validation score so far.
      since_best: number of evaluations since then.
      seconds: wall time of training, including validation and compilation.
      step_seconds: wall time of the training steps alone.
      targets: number of targets trained on.
      input: the position of the input streams, as JSON.
    """

    best: float = -1.0
    since_best: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    targets: int = 0
    input: Any = None

    def after_evaluation(self, score: float) -> Progress:
        """The progress after one more evaluation, with this score."""
        since_best = 0 if score > self.best else self.since_best + 1
        return self._replace(best=max(self.best, score), since_best=since_best)


class Checkpoints:
    """The checkpoints in a folder, by step.

    Each holds `state` (the TrainState), `model` (the parameters to evaluate, so that a reader needs no optimizer),
    `progress` (JSON), `metrics` (JSON) if it was evaluated, and `digests.json`, against which all of these are checked
    before they are read. Writing is asynchronous and atomic: the digests are written before a checkpoint gets its final
    name, so a run that is killed at any moment leaves no checkpoint without them. Use as a context manager, which waits
    for the last write.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        """Training, which is not `read_only`, goes back to the newest whole checkpoint: damaged ones are moved to
        `damaged_checkpoints` beside the folder, with a warning that names the steps that are done again.

        Args:
          read_only: leaves the folder as it is, because a run may be writing there at the same time.

        Raises:
          UserError: every checkpoint is damaged; or, if `read_only`, the metrics of one are, so that the best one is
            not known.
        """
        self._read_only, self._folder = read_only, folder.absolute()
        self._saving: int | None = None
        steps = _steps(self._folder)
        if read_only:  # Orbax warns of it each time.
            logging.getLogger("absl").addFilter(_is_news)
            for step in steps:
                self._check(step, _METRICS)
        else:
            self._remove_old()
            steps = _set_damaged_aside(self._folder, steps)
        self._scores = {step: score for step in steps if (score := _score(self._folder / str(step))) is not None}
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                todelete_subdir=None if read_only else _REMOVED_FOLDER,
                save_interval_steps=0 if read_only else 1,
                # Orbax would read files here that nobody has checked.
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the best score; of equal ones the latest."""
        return max(self._scores, key=lambda step: (self._scores[step], step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question after a checkpoint: which are kept. The latest and the best."""
        kept = (checkpoints[-1].step if checkpoints else None, self.best_step)
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def save(self, state: TrainState, progress: Progress, metrics: dict[str, float] | None) -> None:
        """
        Args:
          metrics: those of the validation split, whose SELECTION_METRIC selects the best checkpoint. None for a
            checkpoint without an evaluation, which is only kept while it is the latest.
        """
        self._manager.wait_until_finished()  # The last checkpoint's writer reads what is set here.
        self._remove_old()
        self._saving = step = int(state.step)
        items = {
            "state": ocp.args.StandardSave(state._asdict()),
            "model": ocp.args.StandardSave(nnx.to_pure_dict(state.evaluation_params)),
            "progress": ocp.args.JsonSave(progress._asdict()),
        }
        if metrics is not None:
            self._scores[step] = metrics[SELECTION_METRIC]
            items[_METRICS] = ocp.args.JsonSave(metrics)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def _write_digests(self) -> None:
        """Orbax calls this in process 0 when all processes have written their files, and only then renames the folder
        to its step."""
        (written,) = self._folder.glob(f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}*")
        digests.write(written, without=[_COMMITTED])

    def _remove_old(self) -> None:
        """Removes the checkpoints that are not kept any more."""
        if distributed.is_main():
            shutil.rmtree(self._folder / _REMOVED_FOLDER, ignore_errors=True)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, Progress]:
        """The newest state, in the shapes and shardings of `like`, and its progress."""
        restored = self._restore(
            self.latest_step,
            state=ocp.args.StandardRestore(_abstract(like._asdict())),
            progress=ocp.args.JsonRestore(),
        )
        return TrainState(**restored.state), Progress(**restored.progress)

    def restore_best(self, like: nnx.State) -> nnx.State:
        """The best checkpoint's parameters, in the shapes and shardings of `like`.

        Raises:
          UserError: the best checkpoint is damaged or missing. No other one takes its place.
        """
        best = self.best_step
        if (latest := self.latest_step) is not None:
            score = self._progress(latest).best
            if score > self._scores.get(best, -1.0):
                raise UserError(
                    f"{self._folder}: the best checkpoint, of validation {SELECTION_METRIC} {score:.6g}, is not there; "
                    "put it back, or train in a new workdir"
                )
        pure = nnx.to_pure_dict(like)
        restored = self._restore(best, model=ocp.args.StandardRestore(_abstract(pure)))
        params = jax.tree.map(lambda leaf: leaf, like)
        nnx.replace_by_pure_dict(params, restored.model)
        return params

    def latest_progress(self) -> Progress:
        """The progress of the newest state."""
        return self._progress(self.latest_step)

    def training_cost(self) -> dict[str, float]:
        """`train_seconds`, the wall time of training over all resumed parts, including validation and compilation; and
        `train_targets_per_second`, for the training steps alone."""
        progress = self.latest_progress()
        return {
            "train_seconds": progress.seconds,
            "train_targets_per_second": progress.targets / progress.step_seconds,
        }

    def _progress(self, step: int | None) -> Progress:
        return Progress(**self._restore(step, progress=ocp.args.JsonRestore()).progress)

    def _restore(self, step: int | None, **items):
        folder = self._folder
        if step is None:
            raise UserError(f"{folder}: holds no checkpoint; train in this workdir first")
        if self._read_only:  # Otherwise all were checked when the folder was opened.
            self._check(step, *items)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            # Orbax may list a whole tree of parameters.
            reason, path = first_line(error)[:150], folder / str(step)
            self._require_still_there(path, error)
            raise UserError(
                f"{path}: can't be restored ({reason}); the checkpoint is damaged or another config's: "
                "remove it or choose another --workdir"
            ) from error

    def _check(self, step: int, *items: str) -> None:
        """
        Raises:
          UserError: one of the items of this checkpoint is damaged.
        """
        if damage := _find_damage(self._folder / str(step), *items):
            self._require_still_there(self._folder / str(step))
            raise UserError(
                f"{damage}; checkpoint {step} is damaged: copy it back, or train in this workdir again, which goes "
                "back to the newest whole one"
            )

    def _require_still_there(self, path: Path, error: Exception | None = None) -> None:
        if self._read_only and not path.exists():
            raise UserError(f"{path}: was replaced by a run that is training here; try again") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        """Waits until everything is written."""
        self._manager.close()
        if not self._read_only:
            self._remove_old()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def _score(checkpoint: Path) -> float | None:
    """The score by which the best checkpoint is selected; None if it was not evaluated."""
    file = checkpoint / _METRICS / _METRICS
    if not file.exists():
        return None
    score = read_json_object(file).get(SELECTION_METRIC)
    if not isinstance(score, int | float):
        raise UserError(f"{file}: has no {SELECTION_METRIC}; the checkpoint is damaged: copy it back, or remove it")
    return score


def _find_damage(checkpoint: Path, *items: str) -> str | None:
    """See `digests.find_damage`; all processes share the work."""
    found = digests.find_damage(checkpoint, items, jax.process_index(), jax.process_count())
    return next(filter(None, distributed.all_gather(found)), None)


def _set_damaged_aside(folder: Path, steps: Sequence[int]) -> list[int]:
    """Moves damaged checkpoints out of the folder. Returns the steps that are left.

    Raises:
      UserError: none would be left.
    """
    damage = {step: found for step in steps if (found := _find_damage(folder / str(step)))}
    whole = [step for step in steps if step not in damage]
    if damage and not whole:
        raise UserError(f"{damage[steps[-1]]}; no checkpoint here is whole: copy one back, or train in a new workdir")
    for step, found in damage.items():
        lost = f"steps {whole[-1] + 1} to {step} are lost, and done again" if step > whole[-1] else "it is lost"
        place = _free_name(folder.parent / DAMAGED_FOLDER / str(step))
        distributed.warn(
            __name__,
            f"{found}; checkpoint {step} is damaged and was moved to {place}: {lost}; training goes on from step "
            f"{whole[-1]}",
        )
        if distributed.is_main():
            _move(folder / str(step), place)
    if damage:
        distributed.barrier()
    return whole


def _free_name(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _move(checkpoint: Path, place: Path) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        os.rename(checkpoint, place)
    except OSError as error:
        raise UserError(f"{checkpoint}: can't be moved to {place} ({error.strerror}); move it yourself") from error


def _is_news(record: logging.LogRecord) -> bool:
    return "directory is read only" not in record.getMessage()


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
