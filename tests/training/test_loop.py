import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from simgr_jax.compilation.jaxpr import matmul_flops
from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.errors import Stopped, UserError
from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.models.simgr import SimGR
from simgr_jax.run import Run
from simgr_jax.training import loop, metric_writer
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training import state as state_module
from simgr_jax.training.checkpoints import Checkpoints
from simgr_jax.training.metric_writer import MetricWriter
from simgr_jax.training.state import create_state, make_train_step

STEPS_PER_EPOCH = 5


def scores(workdir):
    """Validation NDCG@10 by step."""
    return {line["step"]: line["validation/NDCG@10"] for line in tiny_run.log(workdir) if "validation/NDCG@10" in line}


def kept_steps(workdir):
    return {int(folder.name) for folder in (workdir / "checkpoints").iterdir()}


def final_state(config, workdir):
    """The latest TrainState and Progress of a run."""
    params = nnx.state(tiny_run.make_model(config), nnx.Param)
    like = create_state(params, optimizers.create(config, STEPS_PER_EPOCH), config.training.ema_decay)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore_latest(like)


def untimed(workdir):
    return [
        {name: value for name, value in line.items() if name != "train/targets_per_second"}
        for line in tiny_run.log(workdir)
    ]


def assert_same_run(config, workdir, finished, rtol=0.0):
    """Compares the log without its speeds, the parameters, the optimizer's state and the progress.

    They are equal to the bit by default. Another process may sum in another order, so runs of several processes need an
    `rtol`.
    """
    log, expected_log = untimed(workdir), untimed(finished.workdir)
    assert [line.keys() for line in log] == [line.keys() for line in expected_log]
    for line, expected_line in zip(log, expected_log, strict=True):
        np.testing.assert_allclose(list(line.values()), list(expected_line.values()), rtol=rtol)
    (state, progress), (expected, expected_progress) = (
        final_state(config, workdir),
        final_state(finished.config, finished.workdir),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), state, expected)
    for key in ("since_best", "targets", "input"):
        assert getattr(progress, key) == getattr(expected_progress, key)
    np.testing.assert_allclose(progress.best, expected_progress.best, rtol=rtol)


def validation_ndcg(ranker, config, params=None):
    """params: of the config's model; None takes those before training."""
    model = tiny_run.make_model(config)
    if params is not None:
        nnx.update(model, params)
    return tiny_run.evaluate(ranker, model)["NDCG@10"]


def test_training_learns_what_comes_next(finished):
    losses = [line["train/loss"] for line in tiny_run.log(finished.workdir) if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert scores(finished.workdir)[20] > 2 * validation_ndcg(finished.ranker, finished.config)


@pytest.mark.slow
def test_histories_of_tokens_are_learned_as_well(tmp_path):
    """Items have two codes, so rows of 24 hold as many items as rows of 12 do otherwise, and an epoch has as many
    steps."""
    config = tiny_run.config(row_length=24)
    config.simgr.history = "tokens"
    _, ranker = tiny_run.train(config, tmp_path)
    assert list(scores(tmp_path)) == [5, 10, 15, 20]
    losses = [line["train/loss"] for line in tiny_run.log(tmp_path) if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert scores(tmp_path)[20] > 2 * validation_ndcg(ranker, config)
    _, progress = final_state(config, tmp_path)
    targets_per_epoch = sum(len(user) - 1 for user in tiny_run.split().train)
    assert 0.8 < progress.targets / (4 * targets_per_epoch) <= 1


def test_the_log_has_a_line_every_few_steps_and_at_each_evaluation(finished):
    """The loss is logged every 4 steps and before an evaluation, except at step 16, where no new step has finished."""
    lines = tiny_run.log(finished.workdir)
    assert sorted({line["step"] for line in lines if "train/loss" in line}) == [4, 5, 8, 10, 12, 15, 20]
    assert list(scores(finished.workdir)) == [5, 10, 15, 20]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_nothing_compiles_twice(finished):
    """There are 20 steps, and 4 evaluations of two batches each."""
    assert finished.traces == {"loss": 1, "catalog": 1, "rank": 1}


def test_the_best_and_the_latest_checkpoint_are_kept(finished):
    by_step = scores(finished.workdir)
    assert kept_steps(finished.workdir) == {max(by_step, key=by_step.get), 20}


def test_the_best_checkpoint_scores_what_the_log_says(finished):
    model = tiny_run.make_model(finished.config)
    with Checkpoints(finished.workdir / "checkpoints") as checkpoints:
        params = checkpoints.restore_best(nnx.state(model, nnx.Param))
    assert validation_ndcg(finished.ranker, finished.config, params) == max(scores(finished.workdir).values())


def test_one_seed_gives_one_run(finished, tmp_path):
    """Although it is compiled anew."""
    tiny_run.train(finished.config, tmp_path)
    assert_same_run(finished.config, tmp_path, finished)


def interrupt_at(patch, interrupted_step):
    write = MetricWriter.write

    def interrupting(self, step, scalars):
        write(self, step, scalars)
        if step == interrupted_step:
            raise KeyboardInterrupt

    patch.setattr(MetricWriter, "write", interrupting)


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 12])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(finished, tmp_path, step):
    """Before the first checkpoint, and between the second and the third. Steps after a checkpoint are done again."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            finished.repeat(tmp_path)
    # No thread is left, although the traceback keeps the frames alive. Python would abort if a thread outlived it.
    assert interrupt.tb is not None
    assert not [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]
    assert tiny_run.log(tmp_path)[-1]["step"] == step
    finished.repeat(tmp_path)
    assert_same_run(finished.config, tmp_path, finished)


def test_a_run_that_continues_never_holds_two_states_in_memory(finished, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            finished.repeat(tmp_path)
    restore, given_up = Checkpoints.restore_latest, []

    def restore_latest(self, like):
        given_up.extend(leaf.is_deleted() for leaf in jax.tree.leaves(like))
        return restore(self, like)

    monkeypatch.setattr(Checkpoints, "restore_latest", restore_latest)
    finished.repeat(tmp_path)
    assert given_up and all(given_up)


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(finished, tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(tiny_run.__file__).parent), str(Path(__file__).parents[2])]}
import tiny_run
from functools import partial
from pathlib import Path
from simgr_jax.training.metric_writer import MetricWriter
write = MetricWriter.write
def killing(self, step, scalars):
    write(self, step, scalars)
    if step == 12:
        self._lines._file.write(b'{{"step": 13, "train/lo')
        os.kill(os.getpid(), signal.SIGKILL)
MetricWriter.write = killing
tiny_run.train(tiny_run.config(), Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -signal.SIGKILL
    finished.repeat(tmp_path)
    assert_same_run(finished.config, tmp_path, finished, rtol=1e-4)


def signal_at(patch, step, number):
    """Sends a signal while this step's line is logged."""
    write = MetricWriter.write

    def sending(self, logged_step, scalars):
        write(self, logged_step, scalars)
        if logged_step == step:
            os.kill(os.getpid(), number)

    patch.setattr(MetricWriter, "write", sending)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_it(finished, tmp_path, number):
    """It comes at step 8, whose line is logged when step 8 is done, so step 9 is the one that is saved."""
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 8, number)
        with pytest.raises(Stopped, match=r"^stopped after step 9 of 20, which is saved$"):
            finished.repeat(tmp_path)
    assert signal.getsignal(number) is before
    assert max(kept_steps(tmp_path)) == 9
    assert not [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]
    finished.repeat(tmp_path)
    assert scores(tmp_path) == scores(finished.workdir)
    (state, progress), (expected, other) = (
        final_state(finished.config, workdir) for workdir in (tmp_path, finished.workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert (progress.targets, progress.input) == (other.targets, other.input)


def test_a_signal_during_an_evaluation_waits_for_its_checkpoint(finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        evaluate = tiny_run.evaluate

        def signalled(ranker, model):
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(ranker, model)

        patch.setattr(tiny_run, "evaluate", signalled)
        with pytest.raises(Stopped, match=r"^stopped after step 6 of 20"):
            finished.repeat(tmp_path)
    assert list(scores(tmp_path)) == [5] and kept_steps(tmp_path) == {5, 6}


def test_a_second_signal_does_what_it_did_before_training(finished, tmp_path):
    """Here Python's own handler raises a KeyboardInterrupt; in a binary the process ends."""
    with pytest.MonkeyPatch.context() as patch:
        write = MetricWriter.write

        def sending(self, step, scalars):
            write(self, step, scalars)
            if step == 8:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(MetricWriter, "write", sending)
        with pytest.raises(KeyboardInterrupt) as caught:
            finished.repeat(tmp_path)
    assert not isinstance(caught.value, Stopped)
    assert kept_steps(tmp_path) == {5}


def test_an_ignored_signal_stays_ignored(finished, tmp_path):
    """As under nohup, and in a shell's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, 8, signal.SIGINT)
            finished.repeat(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run(finished.config, tmp_path, finished)


def test_a_full_disk_ends_the_run_at_its_last_checkpoint(finished, tmp_path):
    """Metrics that can't be written would be missing after a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:

        def full(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        add = metric_writer._Lines.add

        def until_step_7(self, line):
            if json.loads(line)["step"] >= 7:
                patch.setattr(metric_writer._Lines, "_write", full)
            add(self, line)

        patch.setattr(metric_writer._Lines, "add", until_step_7)
        with pytest.raises(UserError, match=r"metrics\.jsonl: can't be written \(No space left on device\)"):
            finished.repeat(tmp_path)
    assert kept_steps(tmp_path) == {5}
    finished.repeat(tmp_path)
    assert_same_run(finished.config, tmp_path, finished)


def test_a_finished_run_can_be_trained_longer(finished, tmp_path):
    """With a restart after the fourth epoch it is the run that was planned so from the beginning."""
    longer = tiny_run.config(epochs=6)
    longer.optimizer.restart_epoch = 4
    workdir, planned = tmp_path / "longer", tmp_path / "planned"
    shutil.copytree(finished.workdir, workdir)
    programs = tiny_run.Programs()
    tiny_run.train(longer, workdir, programs)
    tiny_run.train(longer, planned, programs)
    assert_same_run(longer, workdir, finished._replace(config=longer, workdir=planned))
    assert list(scores(workdir)) == [5, 10, 15, 20, 25, 30]


def test_a_restart_before_the_epoch_that_the_run_has_reached_is_refused(finished):
    """The run has done four epochs. A restart that it had from the beginning stays."""
    longer, windows = tiny_run.config(epochs=6), tiny_run.make_windows(finished.config)
    longer.optimizer.restart_epoch = 3
    with pytest.raises(UserError, match=r"^config\.optimizer\.restart_epoch: .* epoch 4, .* after epoch 3; give 4 or"):
        loop.check_longer(windows, longer, finished.workdir, new_restart=True)
    loop.check_longer(windows, longer, finished.workdir, new_restart=False)
    longer.optimizer.restart_epoch = 4
    loop.check_longer(windows, longer, finished.workdir, new_restart=True)


def test_without_a_restart_a_longer_run_goes_on_at_the_longer_schedules_rate(finished, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(finished.workdir, workdir)
    before = tiny_run.log(workdir)
    with mock.patch.object(optimizers, "learning_rate_schedule", wraps=optimizers.learning_rate_schedule) as schedule:
        tiny_run.train(tiny_run.config(epochs=6), workdir)
    # One schedule for all 30 steps, of which 20 are done.
    assert {call.args[1:] for call in schedule.call_args_list} == {(30, 0)}
    log = tiny_run.log(workdir)
    assert log[: len(before)] == before and log[-1]["step"] == 30


def test_a_checkpoint_between_evaluations_is_continued_from_but_never_the_best(finished, tmp_path):
    options = {"checkpoint_every_steps": 2, "log_every_steps": 1000}
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            finished.repeat(tmp_path, **options)
    by_step = scores(tmp_path)
    best = max(by_step, key=by_step.get)
    assert kept_steps(tmp_path) == {best, 12}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (12, best)
    finished.repeat(tmp_path, **options)
    assert scores(tmp_path) == scores(finished.workdir)
    assert kept_steps(tmp_path) == kept_steps(finished.workdir)


def test_a_finished_run_does_no_step_when_started_again(finished):
    files = {path: path.stat().st_mtime_ns for path in (finished.workdir / "checkpoints").rglob("*") if path.is_file()}
    log = (finished.workdir / "metrics.jsonl").read_bytes()
    finished.repeat(finished.workdir)
    assert (finished.workdir / "metrics.jsonl").read_bytes() == log
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert kept_steps(finished.workdir) == {int(path.name) for path in (finished.workdir / "checkpoints").iterdir()}


def test_training_stops_when_it_has_stopped_getting_better(tmp_path):
    config = tiny_run.config(epochs=50, patience=2)
    config.optimizer.learning_rate = 1e-12
    tiny_run.train(config, tmp_path)
    assert list(scores(tmp_path)) == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH]


def test_the_averaged_parameters_are_evaluated_and_kept(finished, tmp_path):
    config = tiny_run.config(ema_decay=0.99, epochs=1)
    tiny_run.train(config, tmp_path)
    state, _ = final_state(config, tmp_path)
    logged = scores(tmp_path)[STEPS_PER_EPOCH]
    assert validation_ndcg(finished.ranker, config, state.averaged_params) == logged
    assert validation_ndcg(finished.ranker, config, state.params) != logged
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_best(state.params), state.averaged_params)


def test_gradients_can_be_accumulated_over_batches(tmp_path):
    config = tiny_run.config(epochs=2)
    config.optimizer.accumulate_steps = 2
    tiny_run.train(config, tmp_path)
    state, _ = final_state(config, tmp_path)
    assert int(state.optimizer_state.gradient_step) == 5


def test_a_run_that_diverges_ends_before_it_is_kept(tmp_path):
    config = tiny_run.config(log_every_steps=1000)
    config.optimizer.learning_rate = 1e30
    config.simgr.similarity = "dot"
    with pytest.raises(UserError, match=r"^config\.optimizer\.learning_rate: the loss or its gradient was not finite"):
        tiny_run.train(config, tmp_path)
    assert not kept_steps(tmp_path)


def test_a_checkpoint_of_the_step_that_ruined_the_parameters_is_not_called_good(tmp_path):
    """Its own loss and gradient were finite."""
    config = tiny_run.config(log_every_steps=1000, checkpoint_every_steps=1, max_bad_steps=2)
    config.optimizer.learning_rate = 1e30
    config.simgr.similarity = "dot"
    latest = r"so training stops; the latest checkpoint is .*/checkpoints/\d+, whose own step was finite; lower the "
    with pytest.raises(UserError, match=latest) as caught:
        tiny_run.train(config, tmp_path)
    assert "good" not in str(caught.value)
    assert kept_steps(tmp_path)


def test_gradients_that_are_not_finite_end_the_run_although_the_loss_is(tmp_path, monkeypatch):
    @jax.custom_vjp
    def spoiled(loss):
        return loss

    spoiled.defvjp(lambda loss: (loss, None), lambda _, gradient: (jnp.nan * gradient,))
    loss = SimGR.loss
    with_spoiled_gradient = lambda *arguments: (spoiled((found := loss(*arguments))[0]), found[1])  # noqa: E731
    monkeypatch.setattr(SimGR, "loss", with_spoiled_gradient)
    with pytest.raises(UserError, match=r"^config\.optimizer\.learning_rate: the loss or its gradient was not finite"):
        tiny_run.train(tiny_run.config(log_every_steps=2), tmp_path)
    assert not kept_steps(tmp_path)


def spoil(monkeypatch, is_bad):
    """Makes the loss NaN in the steps, counted from 1, of which `is_bad` is true."""
    steps, step_rngs, loss = [], state_module.step_rngs, SimGR.loss

    def recording(seed, step):
        steps.append(step + 1)
        return step_rngs(seed, step)

    def spoiled(*arguments):
        value, scalars = loss(*arguments)
        return jnp.where(is_bad(steps[-1]), jnp.nan, value), scalars

    monkeypatch.setattr(state_module, "step_rngs", recording)
    monkeypatch.setattr(SimGR, "loss", spoiled)


def test_a_step_that_is_not_finite_changes_nothing_but_the_steps_number(monkeypatch):
    spoil(monkeypatch, lambda step: step == 2)
    config = tiny_run.config(ema_decay=0.9)
    graphdef, params, rest = nnx.split(tiny_run.make_model(config), nnx.Param, ...)
    optimizer = optimizers.create(config, STEPS_PER_EPOCH)
    state = create_state(params, optimizer, 0.9)
    train_step = make_train_step(graphdef, optimizer, 0.9, config.seed, state)
    states, are_finite = [jax.device_get(state)], []
    with closing(train_batches(tiny_run.make_windows(config), config.training.batch_rows, config.seed)) as batches:
        for _ in range(3):
            state, scalars = train_step(state, rest, sharding.join_batch(next(batches)))
            states.append(jax.device_get(state))
            are_finite.append(bool(scalars["is_finite"]))
    assert are_finite == [True, False, True]
    _, first, second, third = states
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, second._replace(step=first.step), first)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), third.params, second.params)
    assert any(jax.tree.leaves(changed))


BACKBONE = ("backbone", "text_embedding")
split_backbone = partial(optimizers.split_parts, parts=BACKBONE)


def backbone_of(state):
    """All that a TrainState holds of the backbone."""
    averaged = None if state.averaged_params is None else split_backbone(state.averaged_params)[1]
    return split_backbone(state.params)[1], averaged, state.optimizer_state.inner_states["backbone"]


@pytest.mark.slow
def test_a_frozen_backbone_stays_as_it_is_and_costs_no_gradients_of_its_weights():
    config = tiny_run.pretrained_config(ema_decay=0.9)
    config.simgr.readout = "state"  # The other begins with a map of zeros, so at first the backbone has no gradients.
    graphdef, params, rest = nnx.split(tiny_run.make_model(config), nnx.Param, ...)
    states, flops = {}, {}
    with closing(train_batches(tiny_run.make_windows(config), config.training.batch_rows, config.seed)) as batches:
        batch = next(batches)
    for frozen in (True, False):
        optimizer = optimizers.create(config, STEPS_PER_EPOCH, frozen)
        start = state = create_state(jax.tree.map(jnp.copy, params), optimizer, config.training.ema_decay)
        before = jax.device_get(start)
        train_step = make_train_step(
            graphdef, optimizer, config.training.ema_decay, config.seed, state, BACKBONE if frozen else ()
        )
        flops[frozen] = matmul_flops(jax.make_jaxpr(train_step)(state, rest, batch))
        for _ in range(2):  # The first step's learning rate is zero.
            state, _ = train_step(state, rest, batch)
        states[frozen] = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, backbone_of(states[True]), backbone_of(before))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), backbone_of(states[False]), backbone_of(before))
    assert all(jax.tree.leaves(changed))
    new = [split_backbone(states[frozen].params)[0] for frozen in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *new)
    # The gradient of a weight takes as many operations as its product.
    tokens = batch.inputs.size
    weights = sum(leaf.size for leaf in jax.tree.leaves(split_backbone(params)[1]) if leaf.ndim > 2)
    assert flops[False] - flops[True] == 2 * tokens * weights


@pytest.mark.slow
def test_a_run_whose_backbone_thaws_compiles_one_step_for_each_phase(thawed):
    assert thawed.traces == {"loss": 2, "catalog": 1, "rank": 1}


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_run_whose_backbone_is_frozen_at_first_continues_as_if_nothing_had_happened(thawed, tmp_path, step):
    """It stops before the first checkpoint, after the thaw with a checkpoint from before, and later."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            thawed.repeat(tmp_path)
    if step == 8:
        state, _ = final_state(thawed.config, tmp_path)
        params = nnx.state(tiny_run.make_model(thawed.config), nnx.Param)
        start = create_state(params, optimizers.create(thawed.config, STEPS_PER_EPOCH), 0.9)
        jax.tree.map(np.testing.assert_array_equal, backbone_of(state), backbone_of(start))
        assert not np.array_equal(state.params["embedding"].get_value(), params["embedding"].get_value())
    thawed.repeat(tmp_path)
    assert_same_run(thawed.config, tmp_path, thawed)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 7])
def test_a_run_that_a_signal_stops_at_the_thaw_continues_there(thawed, tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        stop_at = lambda _, at, state: at == step  # noqa: E731
        patch.setattr(loop.StopRequest, "at", stop_at)
        thawed.repeat(tmp_path)
    assert max(kept_steps(tmp_path)) == step
    thawed.repeat(tmp_path)
    states = [final_state(thawed.config, workdir)[0] for workdir in (tmp_path, thawed.workdir)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert scores(tmp_path) == scores(thawed.workdir)


@pytest.mark.slow
def test_a_backbone_that_is_frozen_in_all_epochs_is_that_of_the_checkpoint_at_the_end(tmp_path, capsys):
    config = tiny_run.pretrained_config(freeze_epochs=2, epochs=2)
    config.optimizer.accumulate_steps = 3
    tiny_run.train(config, tmp_path)
    assert "what is pretrained is frozen in the first 9 of 10 steps" in capsys.readouterr().out
    state, _ = final_state(config, tmp_path)
    before = nnx.state(tiny_run.make_model(config), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, *(split_backbone(p)[1] for p in (state.params, before)))


def test_bad_steps_are_counted_and_do_not_stop_a_run(tmp_path, monkeypatch, caplog):
    """Step 10 is one of them, so the checkpoint and evaluation of that step are left out."""
    spoil(monkeypatch, lambda step: (step == 6) | (step == 10))
    tiny_run.train(tiny_run.config(), tmp_path)
    lines = tiny_run.log(tmp_path)
    counted = {line["step"]: line["train/bad_steps"] for line in lines if "train/bad_steps" in line}
    assert counted == {4: 0, 5: 0, 8: 1, 10: 1, 12: 0, 15: 0, 20: 0}
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert list(scores(tmp_path)) == [5, 15, 20]
    assert "step 10: no checkpoint, because this step was skipped" in caplog.text
    assert "step 8: 1 of the last 2 steps were skipped, because their loss or gradient was not finite" in caplog.text


def test_many_bad_steps_in_a_row_stop_the_run_at_its_latest_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step > 7)
    with pytest.raises(UserError) as error:
        tiny_run.train(tiny_run.config(max_bad_steps=3), tmp_path)
    assert str(error.value).startswith(
        "config.optimizer.learning_rate: the loss or its gradient was not finite in 3 steps in a row, before step 11, "
        f"so training stops; the latest checkpoint is {tmp_path}/checkpoints/5, whose own step was finite; lower the "
    )
    assert kept_steps(tmp_path) == {5}
    assert [line["train/bad_steps"] for line in tiny_run.log(tmp_path) if line["step"] == 10] == [3]


def test_a_run_whose_last_steps_are_bad_keeps_none_of_them(tmp_path, monkeypatch):
    """One bad step at the end is an accident; two follow from a step that ruined the parameters."""
    spoil(monkeypatch, lambda step: step > 18)
    with pytest.raises(
        UserError, match=r"not finite in 2 steps in a row, before step 21, .*checkpoint is .*/checkpoints/15"
    ):
        tiny_run.train(tiny_run.config(), tmp_path)
    assert max(kept_steps(tmp_path)) == 15


def test_sequences_of_single_items_are_refused(tmp_path):
    run, split = Run(tiny_run.config(), tmp_path), tiny_run.split()
    run.prompt = tiny_run.prompt(run.config)
    run._data = None, dataclasses.replace(split, train=Sequences.from_lists([[1], [2]]))
    with pytest.raises(UserError, match=r"^config\.data\.split: leaves no training sequence"):
        _ = run.windows
