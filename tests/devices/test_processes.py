"""The binaries as several processes started by launch/local.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from simgr_jax.devices.choose_dtype import choose_dtype
from simgr_jax.workdir import lock
from tests import virtual_devices


@pytest.fixture(scope="module")
def launch(root):
    """A function (count, *arguments) -> CompletedProcess of launch/local.sh."""

    def launch(count, *arguments):
        env = os.environ | virtual_devices.UNCACHED | {"PYTHON": sys.executable}
        command = [str(root / "launch" / "local.sh"), str(count), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)

    return launch


@pytest.fixture(scope="module")
def trained(launch, tiny_options, tmp_path_factory):
    """A finished run of two processes, and its workdir."""
    workdir = tmp_path_factory.mktemp("several") / "workdir"
    ended = launch(2, *tiny_options, "--config.training.input_streams=4", f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    return ended, workdir


@pytest.mark.slow
def test_only_one_process_prints_and_writes(trained):
    ended, workdir = trained
    assert ended.stdout.count("200 users, 60 items") == 1
    assert ended.stdout.count("validation/NDCG@10") == 1
    assert ended.stdout.count("the report is in") == 1
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert {"config.json", "semantic_ids.json", "checkpoints", "report"} <= {path.name for path in workdir.iterdir()}
    assert [path.name for path in workdir.rglob(".*")] == [lock.FILE_NAME], "a file is half written"


@pytest.mark.slow
def test_a_users_mistake_is_one_line(launch, tiny_options, tmp_path):
    options = (*tiny_options, f"--workdir={tmp_path}", "--config.data.format=p5", f"--config.data.path={tmp_path}/no")
    ended = launch(2, *options)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_several_processes_report_the_same_as_one(trained, launch, run_binary):
    _, workdir = trained
    options = ("--split=validation", f"--workdir={workdir}")
    report = workdir / "report_validation" / "metrics.json"
    assert launch(2, "--binary=evaluate", *options).returncode == 0
    several = json.loads(report.read_text())
    report.unlink()
    assert run_binary("evaluate", *options) == 0
    assert several == json.loads(report.read_text())


@pytest.mark.slow
def test_several_processes_recommend_the_same_as_one(trained, launch, run_binary, tmp_path):
    _, workdir = trained
    several, one = tmp_path / "several.jsonl", tmp_path / "one.jsonl"
    assert launch(2, "--binary=recommend", f"--workdir={workdir}", f"--output={several}").returncode == 0
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={one}") == 0
    assert several.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_one_process_continues_with_what_several_have_chosen(launch, tiny_options, run_binary, tmp_path, capfd):
    """Six streams and two devices share 6 rows, where one device alone would have 4."""
    options = (*tiny_options, "--config.training.batch_rows=0", "--config.backbone.dtype=auto", f"--workdir={tmp_path}")
    ended = launch(2, *options, "--config.training.input_streams=6")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("each of 6 rows of 64 positions") == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["training"]["batch_rows"], config["backbone"]["dtype"]) == (6, choose_dtype("cpu"))
    longer = ("--config.training.input_streams=6", "--config.training.epochs=2")
    assert run_binary("train", *options, *longer, "--noreport") == 0
    out = capfd.readouterr().out
    assert "2 epochs" in out and "each of 6 rows of 64 positions" in out and "continuing after step" in out
    assert json.loads((tmp_path / "config.json").read_text())["training"]["batch_rows"] == 6
