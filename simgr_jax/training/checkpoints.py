"""Orbax checkpoints of a run: the latest, to continue from, and the best by validation NDCG@10, to keep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from simgr_jax.errors import UserError, first_line
from simgr_jax.evaluation.metrics import SELECTION_METRIC
from simgr_jax.training.state import TrainState


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

    Each holds `state` (the TrainState), `model` (the parameters to evaluate, so that a reader needs no optimizer) and
    `progress` (JSON). Writing is asynchronous and atomic. Use as a context manager, which waits for the last write.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        """read_only: leaves the folder as it is, because a run may be writing there at the same time."""
        self._read_only = read_only
        if read_only:  # Orbax warns of it each time.
            logging.getLogger("absl").addFilter(_is_news)
        selection = lambda metrics: metrics[SELECTION_METRIC]  # noqa: E731
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=selection,
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(1),
                        preservation_policy.BestN(get_metric_fn=selection, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                save_interval_steps=0 if read_only else 1,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        return self._manager.best_step()

    def save(self, state: TrainState, progress: Progress, metrics: dict[str, float] | None) -> None:
        """
        Args:
          metrics: those of the validation split, whose SELECTION_METRIC selects the best checkpoint. None for a
            checkpoint without an evaluation, which is only kept while it is the latest.
        """
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                model=ocp.args.StandardSave(nnx.to_pure_dict(state.evaluation_params)),
                progress=ocp.args.JsonSave(progress._asdict()),
            ),
            metrics=metrics,
        )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, Progress]:
        """The newest state, in the shapes and shardings of `like`, and its progress."""
        restored = self._restore(
            self.latest_step,
            state=ocp.args.StandardRestore(_abstract(like._asdict())),
            progress=ocp.args.JsonRestore(),
        )
        return TrainState(**restored.state), Progress(**restored.progress)

    def restore_best(self, like: nnx.State) -> nnx.State:
        """The best checkpoint's parameters, in the shapes and shardings of `like`."""
        pure = nnx.to_pure_dict(like)
        restored = self._restore(self.best_step, model=ocp.args.StandardRestore(_abstract(pure)))
        params = jax.tree.map(lambda leaf: leaf, like)
        nnx.replace_by_pure_dict(params, restored.model)
        return params

    def training_cost(self) -> dict[str, float]:
        """`train_seconds`, the wall time of training over all resumed parts, including validation and compilation; and
        `train_targets_per_second`, for the training steps alone."""
        progress = Progress(**self._restore(self.latest_step, progress=ocp.args.JsonRestore()).progress)
        return {
            "train_seconds": progress.seconds,
            "train_targets_per_second": progress.targets / progress.step_seconds,
        }

    def _restore(self, step: int | None, **items):
        folder = self._manager.directory
        if step is None:
            raise UserError(f"{folder}: holds no checkpoint; train in this workdir first")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            # Orbax may list a whole tree of parameters.
            reason, path = first_line(error)[:150], folder / str(step)
            if self._read_only and not path.exists():
                raise UserError(f"{path}: was replaced by a run that is training here; try again") from error
            raise UserError(
                f"{path}: can't be restored ({reason}); the checkpoint is damaged or another config's: "
                "remove it or choose another --workdir"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        """Waits until everything is written."""
        self._manager.close()


def _is_news(record: logging.LogRecord) -> bool:
    return "directory is read only" not in record.getMessage()


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
