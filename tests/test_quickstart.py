"""What `make quickstart` promises, at full size."""

import json
import os
import subprocess
import sys

import pytest

# Compiled in full, and anew by each run.
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}


@pytest.mark.slow
def test_quickstart_beats_popularity_threefold_and_comes_near_the_oracle(root, tmp_path):
    command = [sys.executable, "-m", "simgr_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    ended = subprocess.run(command, cwd=root, check=True, env=os.environ | AS_USERS, stderr=subprocess.PIPE, text=True)
    assert "popularity" not in ended.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["HR@10"] >= 3 * metrics["popularity/HR@10"]
    assert metrics["HR@10"] >= 0.6 * metrics["oracle/HR@10"]
    assert metrics["oracle/HR@10"] > metrics["HR@10"]


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_metrics_timings_aside(root, tmp_path):
    reports = []
    for name in ("first", "second"):
        small = ["--config.training.epochs=1", "--config.data.synthetic.num_users=300"]
        command = [sys.executable, "-m", "simgr_jax.train", "--config=configs/quickstart.py", *small]
        environment = os.environ | AS_USERS | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, f"--workdir={tmp_path / name}"], cwd=root, check=True, env=environment)
        report = json.loads((tmp_path / name / "report" / "metrics.json").read_text(encoding="utf-8"))
        timings = ("train_seconds", "train_targets_per_second")
        assert all(report.pop(timing) > 0 for timing in timings)
        reports.append(report)
    assert reports[0] == reports[1]
