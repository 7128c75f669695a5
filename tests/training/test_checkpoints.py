import shutil

import jax.numpy as jnp
import optax
import pytest
import tiny_run
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.training.checkpoints import Checkpoints, Progress
from simgr_jax.training.state import create_state

# When one of Orbax's reading threads fails, the others complain.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def params_of(config):
    return nnx.state(tiny_run.make_model(config), nnx.Param)


def test_a_folder_without_checkpoints_says_so(tmp_path, finished):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(UserError, match="holds no checkpoint; train in this workdir first"):
            checkpoints.restore_best(params_of(finished.config))


def test_another_models_checkpoint_is_refused(finished):
    other = tiny_run.config()
    other.backbone.width = 24
    with Checkpoints(finished.workdir / "checkpoints") as checkpoints:
        with pytest.raises(UserError, match=r"can't be restored \(.*\); the checkpoint is damaged or another config's"):
            checkpoints.restore_best(params_of(other))


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished.workdir / "checkpoints", folder)
    with Checkpoints(folder) as checkpoints:
        best = folder / str(checkpoints.best_step)
        for file in (best / "model").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(UserError) as error:
            checkpoints.restore_best(params_of(finished.config))
    assert str(error.value).startswith(f"{best}: can't be restored (")
    assert "\n" not in str(error.value)


def test_a_reader_leaves_checkpoints_alone_that_are_being_written(finished, tmp_path):
    folder = shutil.copytree(finished.workdir / "checkpoints", tmp_path / "checkpoints")
    being_written = folder / "25.orbax-checkpoint-tmp-0" / "model"
    being_written.mkdir(parents=True)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 20
        checkpoints.restore_best(params_of(finished.config))
    assert being_written.is_dir()


def test_a_run_removes_a_checkpoint_that_another_left_unfinished(finished, tmp_path):
    folder = shutil.copytree(finished.workdir / "checkpoints", tmp_path / "checkpoints")
    half_written = folder / "25.orbax-checkpoint-tmp-0" / "model"
    half_written.mkdir(parents=True)
    state = create_state(params_of(finished.config), optax.sgd(0.1), 0)._replace(step=jnp.int32(25))
    # Orbax removes it in the background, and waits for this before it writes.
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step == 20
        checkpoints.save(state, Progress(), None)
    assert not half_written.exists()
    assert (folder / "25" / "model").is_dir()


def test_a_reader_is_told_that_a_run_replaced_the_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished.workdir / "checkpoints", tmp_path / "checkpoints")
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = folder / str(checkpoints.best_step)
        shutil.rmtree(best)
        with pytest.raises(UserError, match=f"^{best}: was replaced by a run that is training here; try again$"):
            checkpoints.restore_best(params_of(finished.config))


def test_a_checkpoint_keeps_the_cost_of_training(finished):
    with Checkpoints(finished.workdir / "checkpoints") as checkpoints:
        cost = checkpoints.training_cost()
    assert set(cost) == {"train_seconds", "train_targets_per_second"}
    # The seconds include validation and compilation, the speed does not.
    assert cost["train_seconds"] * cost["train_targets_per_second"] > 20 * 30


def test_progress_counts_the_evaluations_since_the_best_one():
    progress = Progress()
    for score, best, since_best in ((0.2, 0.2, 0), (0.2, 0.2, 1), (0.1, 0.2, 2), (0.3, 0.3, 0)):
        progress = progress.after_evaluation(score)
        assert (progress.best, progress.since_best) == (best, since_best)
