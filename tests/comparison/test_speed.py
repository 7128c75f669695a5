import shutil

import numpy as np
import pytest

from simgr_jax.comparison import speed
from simgr_jax.comparison.speed import measure
from simgr_jax.workdir import config_file


def test_models_take_turns_and_are_warm(monkeypatch, trained_workdir):
    """The trained model twice, by a clock that knows what each costs."""
    calls, clock = [], [0.0]
    names = iter("ab")
    restore = speed.restore

    class Ranker:
        def __init__(self, name):
            self.name, self.seconds = name, {"a": 2.0, "b": 4.0}[name]

        def catalog(self, params, rest):
            # The first call compiles.
            clock[0] += 0.5 if self.name in calls else 100.0
            return np.zeros(3)

        def lists(self, params, rest, cases, catalog):
            assert catalog.shape == (3,)
            calls.append(self.name)
            clock[0] += self.seconds if calls.count(self.name) > 1 else 100.0

    def restored(workdir, values):
        trained = restore(workdir, values)
        return trained._replace(prepared=trained.prepared._replace(ranker=Ranker(next(names))))

    monkeypatch.setattr(inference, "restore", restored)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    users, speeds = measure(dict.fromkeys("ab", trained_workdir), {}, batch_size=8, batches=3, rounds=3)
    assert users == 24
    assert speeds == {"a": ([12.0] * 3, [0.5] * 3), "b": ([6.0] * 3, [0.5] * 3)}
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(("batches", "users"), [(3, 48), (100, 200)])
def test_a_trained_model_ranks_the_first_users(trained_workdir, tmp_path, batches, users):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = config_file.load(workdir)
    found, speeds = measure({"a": workdir}, {}, batch_size=16, batches=batches, rounds=2)
    assert found == users
    for rounds in speeds["a"]:
        assert len(rounds) == 2 and min(rounds) > 0
    assert config_file.load(workdir) == config


def test_data_and_cache_may_have_moved(trained_workdir, tmp_path):
    """The run's config says where they were when it was trained."""
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    config = config_file.load(workdir)
    with config.unlocked():
        config.cache_dir = str(tmp_path / "gone")
    config_file.save(config, workdir)
    measure({"a": workdir}, {"cache_dir": str(workdir / "cache")}, batch_size=16, batches=1, rounds=1)
    assert not (tmp_path / "gone").exists()
