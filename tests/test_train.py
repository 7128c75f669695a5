"""`simgr_jax.train`, as the binary."""

import json
import shutil

import pytest


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_workdir_alone_continues_its_run(run_binary, tiny_options, trained_workdir, tmp_path):
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


@pytest.mark.parametrize("binary", ["train", "evaluate"])
def test_a_run_refuses_other_items(run_binary, trained_workdir, tmp_path, capfd, binary):
    """Its data are read as a dataset of their own, with a new item that comes first in the catalog."""
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    (folder,) = (workdir / "cache").glob("synthetic-*/")
    sequences, texts = folder / "user_sequence.txt", folder / "item_plain_text.txt"
    first, *others = sequences.read_text().splitlines()
    sequences.write_text("\n".join([f"{first} 0new", *others]))
    texts.write_text(f"0new a new thing\n{texts.read_text()}")
    config = read(workdir / "config.json")
    config["data"] |= {"format": "p5", "path": str(folder)}
    (workdir / "config.json").write_text(json.dumps(config))
    before = (workdir / "report" / "metrics.json").read_bytes()
    assert run_binary(binary, f"--workdir={workdir}") == 2
    assert (
        f"error: {workdir}/trained_on.json:items: have changed since the run here was trained; give"
        in capfd.readouterr().err
    )
    assert (workdir / "report" / "metrics.json").read_bytes() == before


def test_a_run_continues_only_with_its_own_training_sequences(
    run_binary, tiny_options, trained_workdir, tmp_path, capfd
):
    """But it may recommend for histories that it has not seen."""
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    record = read(workdir / "trained_on.json")
    assert record.keys() == {"items", "semantic_ids", "training_sequences"}
    (workdir / "trained_on.json").write_text(json.dumps(record | {"training_sequences": "others"}))
    assert run_binary("train", f"--workdir={workdir}") == 2
    assert f"error: {workdir}/trained_on.json:training_sequences: have changed since" in capfd.readouterr().err
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={tmp_path / 'lists.jsonl'}") == 0
