import shutil

import numpy as np
import pytest

from simgr_jax import run_config
from simgr_jax.comparison import inference
from simgr_jax.comparison.inference import users_per_second
from simgr_jax.data.dataset import EvaluationCases, Sequences


def test_models_take_turns_and_are_warm(monkeypatch, tmp_path):
    calls, clock = [], [0.0]

    def ranker(workdir, batch_size, batches):
        seconds = {"a": 2.0, "b": 4.0}[workdir.name]

        def rank():
            calls.append(workdir.name)
            # The first call compiles.
            clock[0] += seconds if calls.count(workdir.name) > 1 else 100.0
            return batch_size * batches

        return rank

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


def test_the_first_cases():
    cases = EvaluationCases(np.arange(4), Sequences.from_lists([[1], [2, 3], [4], [5, 6]]), np.arange(10, 14))
    first = inference._first(cases, 2)
    assert [list(history) for history in first.histories] == [[1], [2, 3]]
    assert (list(first.users), list(first.targets)) == ([0, 1], [10, 11])
    assert len(first) == len(first.histories) == 2
    assert [list(history) for history in inference._first(cases, 9).histories] == [[1], [2, 3], [4], [5, 6]]
