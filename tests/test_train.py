"""`simgr_jax.train`, as the binary."""

import json


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_workdir_alone_goes_on_with_its_run(run_binary, tiny_options, trained_workdir, tmp_path):
    """First without the report, whose numbers are then those of a run with one."""
    workdir = tmp_path / "workdir"
    assert run_binary("train", *tiny_options, "--noreport", f"--workdir={workdir}") == 0
    assert (workdir / "checkpoints").is_dir() and not (workdir / "report").exists()

    assert run_binary("train", f"--workdir={workdir}") == 0
    timings = ("train_seconds", "train_targets_per_second")
    report, other = (read(folder / "report" / "metrics.json") for folder in (workdir, trained_workdir))
    assert [report.pop(key) > 0 for key in timings] and [other.pop(key) > 0 for key in timings]
    assert report == other
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == len(
        (trained_workdir / "metrics.jsonl").read_text().splitlines()
    )


def test_a_workdir_without_a_run_needs_a_config(run_binary, tmp_path, capfd):
    assert run_binary("train", f"--workdir={tmp_path}") == 2
    assert "--config: is missing; give --config=" in capfd.readouterr().err
