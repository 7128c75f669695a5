import shutil

import pytest

from simgr_jax import run_config
from simgr_jax.comparison import inference
from simgr_jax.comparison.inference import users_per_second


def test_models_take_turns_and_are_warm(monkeypatch, tmp_path):
    calls, clock = [], [0.0]

    def ranker(name, users):
        seconds = {"a": 2.0, "b": 4.0}[name]

        def rank():
            calls.append(name)
            # The first call compiles.
            clock[0] += seconds if calls.count(name) > 1 else 100.0
            return users

        return rank

    monkeypatch.setattr(inference, "restore", lambda workdir, batch_size: workdir.name)
    monkeypatch.setattr(inference, "_ranker", ranker)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])
    users, speeds = users_per_second({name: tmp_path / name for name in "ab"}, batch_size=8, batches=3, rounds=3)
    assert users == 24
    assert speeds == {"a": [12.0] * 3, "b": [6.0] * 3}
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(("batches", "users"), [(3, 48), (100, 200)])
def test_a_trained_model_ranks_the_first_users(trained_workdir, tmp_path, batches, users):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = run_config.load(workdir)
    found, speeds = users_per_second({"a": workdir}, batch_size=16, batches=batches, rounds=2)
    assert found == users
    assert len(speeds["a"]) == 2 and min(speeds["a"]) > 0
    assert run_config.load(workdir) == config
