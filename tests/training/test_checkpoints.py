import json
import logging
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.checkpoints import Checkpoints, Progress
from simgr_jax.training.state import create_state
from simgr_jax.workdir import digests

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


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a run's checkpoints: the best, of step 15, and the latest, of step 20."""
    return shutil.copytree(finished.workdir / "checkpoints", tmp_path / "checkpoints")


def state_like(config):
    return create_state(params_of(config), optimizers.create(config, 5), config.training.ema_decay)


def restored(folder, config):
    """What training and evaluation read."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        return *checkpoints.restore_latest(state_like(config)), checkpoints.restore_best(params_of(config))


def bulk_file(item):
    """The largest file, which holds the numbers."""
    return max((file for file in item.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file, place=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


def best_and_latest(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return folder / str(checkpoints.best_step), folder / str(checkpoints.latest_step)


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
@pytest.mark.parametrize("item", ["model", "metrics"])
def test_evaluation_refuses_a_damaged_best_checkpoint_and_names_the_file(finished, folder, damage, item):
    best, latest = best_and_latest(folder)
    assert best != latest
    file = bulk_file(best / item)
    damage(file)
    with pytest.raises(UserError) as error:
        with Checkpoints(folder, read_only=True) as checkpoints:
            checkpoints.restore_best(params_of(finished.config))
    assert str(error.value).startswith(f"{file}: is ") and f"checkpoint {best.name} is damaged" in str(error.value)
    assert best.exists()


def test_evaluation_takes_no_other_checkpoint_when_the_best_one_is_removed(finished, folder):
    best, _ = best_and_latest(folder)
    shutil.rmtree(best)
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.raises(
            UserError, match=r"checkpoints: the best checkpoint, of validation NDCG@10 0\.\d+, is not the"
        ):
            checkpoints.restore_best(params_of(finished.config))


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
def test_training_goes_back_to_the_newest_whole_checkpoint_and_says_what_is_lost(folder, damage, caplog):
    best, latest = best_and_latest(folder)
    file = bulk_file(latest / "state")
    damage(file)
    damaged = file.read_bytes() if file.exists() else None
    with caplog.at_level(logging.WARNING, "simgr_jax"), Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step == checkpoints.best_step == int(best.name)
    aside = folder.parent / "damaged_checkpoints" / latest.name
    moved = aside / file.relative_to(latest)
    assert (moved.read_bytes() if moved.exists() else None) == damaged
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{file}: is ") and "\n" not in message
    lost = f"steps {int(best.name) + 1} to {latest.name} are lost, and done again"
    assert f"was moved to {aside}: {lost}; training goes on from step {best.name}" in message


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_moved(folder):
    for step in folder.iterdir():
        flip(bulk_file(step / "model"))
    with pytest.raises(UserError, match="is not what was written there; no checkpoint here is whole: copy one back"):
        Checkpoints(folder)
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_best_checkpoint_is_lost_but_not_what_was_trained_since(folder, caplog):
    best, latest = best_and_latest(folder)
    flip(best / "progress" / "metadata")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step == int(latest.name)
    assert f"it is lost; training goes on from step {latest.name}" in caplog.text


def test_a_checkpoint_has_its_digests_when_it_appears(finished, tmp_path, monkeypatch):
    """A run that is killed while it writes them leaves no checkpoint of that step."""

    def killed(folder, without):
        assert folder.name.startswith("5.orbax-checkpoint-tmp") and (folder / "model").is_dir()
        raise RuntimeError("killed")

    monkeypatch.setattr(digests, "write", killed)
    state = create_state(params_of(finished.config), optax.sgd(0.1), 0)._replace(step=jnp.int32(5))
    with pytest.raises(RuntimeError, match="killed"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(), None)
    assert not (tmp_path / "5").exists()


def test_every_file_that_is_read_has_a_digest(folder):
    for step in folder.iterdir():
        files = {str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()}
        assert files - set(json.loads((step / "digests.json").read_text())) <= {
            "digests.json",
            "_CHECKPOINT_METADATA",
            "commit_success.txt",
        }


def test_a_checkpoint_without_digests_is_damaged(finished, folder):
    best, _ = best_and_latest(folder)
    (best / "digests.json").unlink()
    with pytest.raises(
        UserError, match=rf"{best.name}/digests.json: .*; checkpoint {best.name} is damaged: copy it back"
    ):
        restored(folder, finished.config)


@pytest.mark.slow
def test_no_flipped_byte_is_read_as_another_number(finished, folder):
    """At 200 random places of both checkpoints, weighted by files, so that small ones are hit as well."""
    expected, generator = restored(folder, finished.config), np.random.default_rng(0)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    listed = {step: json.loads((step / "digests.json").read_text()) for step in folder.iterdir()}
    detected = 0
    for _ in range(200):
        file = files[generator.integers(len(files))]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
        file.write_bytes(damaged)
        try:
            found = restored(folder, finished.config)
        except UserError as error:
            checkpoint = folder / file.relative_to(folder).parts[0]
            has_digest = str(file.relative_to(checkpoint)) in listed[checkpoint]
            assert str(error).startswith(f"{file}: " if has_digest else str(checkpoint))
            detected += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        file.write_bytes(whole)
    assert detected > 50  # No reader reads all of both.


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


def test_a_run_that_is_killed_while_it_removes_a_checkpoint_leaves_no_half_of_it(finished, tmp_path, root, caplog):
    """It is killed when the first file is gone of the checkpoint that the second one has replaced."""
    folder = tmp_path / "checkpoints"
    program = f"""
import os, signal, sys
sys.path[:0] = {[str(root / "tests" / "training"), str(root)]}
import jax.numpy as jnp
import optax
import tiny_run
from flax import nnx
from pathlib import Path
from simgr_jax.training.checkpoints import Checkpoints, Progress
from simgr_jax.training.state import create_state

def killing(path, *arguments, unlink=os.unlink, **options):
    unlink(path, *arguments, **options)
    if "dir_fd" in options or "/checkpoints/" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

os.unlink = killing
state = create_state(nnx.state(tiny_run.make_model(tiny_run.config()), nnx.Param), optax.sgd(0.1), 0)
with Checkpoints(Path({str(folder)!r})) as checkpoints:
    for step in (1, 2):
        checkpoints.save(state._replace(step=jnp.int32(step)), Progress(), {{"NDCG@10": step / 10}})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.best_step == 2
        checkpoints.restore_best(params_of(finished.config))
    with caplog.at_level(logging.WARNING, "simgr_jax"), Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step == 2
    assert not caplog.text and not (tmp_path / "damaged_checkpoints").exists()
    assert [path.name for path in folder.iterdir()] == ["2"]


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
