import json
import shutil

import numpy as np
import pytest

from simgr_jax.comparison import speed
from simgr_jax.comparison.runs import load_finished
from simgr_jax.comparison.speed import measure
from simgr_jax.errors import UserError
from simgr_jax.run import Run


def test_models_take_turns_and_are_warm(monkeypatch, trained_workdir):
    """The trained run twice, by a clock that knows what each costs."""
    calls, clock = [], [0.0]

    class Ranker:
        def __init__(self, name):
            self.name, self.seconds = name, {"a": 2.0, "b": 4.0}[name]

        def catalog(self, model):
            assert model == "the best"
            # The first call compiles.
            clock[0] += 0.5 if self.name in calls else 100.0
            return np.zeros(3)

        def lists(self, model, cases, k, catalog):
            assert (model, k, catalog.shape) == ("the best", 10, (3,))
            calls.append(self.name)
            clock[0] += self.seconds if calls.count(self.name) > 1 else 100.0

    runs = {name: load_finished(trained_workdir, {"evaluation.batch_size": 8}) for name in "ab"}
    for name, run in runs.items():
        run.ranker = Ranker(name)
    monkeypatch.setattr(Run, "best_model", lambda run: "the best")
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    users, speeds = measure(runs, batches=3, rounds=3)
    assert users == 24
    assert speeds == {"a": ([12.0] * 3, [0.5] * 3), "b": ([6.0] * 3, [0.5] * 3)}
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(("batches", "users"), [(3, 48), (100, 200)])
def test_a_trained_model_ranks_the_first_users(trained_workdir, tmp_path, batches, users):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = (workdir / "config.json").read_bytes()
    run = load_finished(workdir, {"evaluation.batch_size": 16})
    found, speeds = measure({"a": run}, batches=batches, rounds=2)
    assert found == users
    for rounds in speeds["a"]:
        assert len(rounds) == 2 and min(rounds) > 0
    assert (workdir / "config.json").read_bytes() == config


def test_data_and_cache_may_have_moved(trained_workdir, tmp_path):
    """The run's config says where they were when it was trained."""
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"cache_dir": str(tmp_path / "gone")}))
    run = load_finished(workdir, {"cache_dir": str(workdir / "cache"), "evaluation.batch_size": 16})
    measure({"a": run}, batches=1, rounds=1)
    assert not (tmp_path / "gone").exists()


def test_a_place_that_the_model_does_not_read_is_left_out(trained_workdir, tmp_path):
    """One of a comparison's models may have an LLM that the others do not take."""
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"model": "sasrec"}))
    run = load_finished(workdir, {"backbone.checkpoint": "llm", "cache_dir": str(workdir / "cache")})
    assert (run.config.backbone.checkpoint, run.config.cache_dir) == ("", str(workdir / "cache"))


def test_a_run_of_other_data_is_refused(trained_workdir, tmp_path):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    file = workdir / "report" / "ranking.npz"
    with np.load(file) as arrays:
        changed = dict(arrays) | {"targets": np.roll(arrays["targets"], 1)}
    np.savez(file, **changed)
    with pytest.raises(UserError) as caught:
        load_finished(workdir, {})
    assert str(caught.value) == (
        f"{workdir}: was judged on other data; give the data that it was judged on, or train it again"
    )
