"""`simgr_jax.train`, as the binary."""

import json
import os
import shutil
import time
import uuid

import pytest

from simgr_jax.workdir.lock import locked


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


def test_two_runs_do_not_train_in_one_workdir_but_readers_may_read(run_binary, trained_workdir, tmp_path, capfd):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    with locked(workdir, "a run is training"):
        assert run_binary("train", f"--workdir={workdir}") == 2
        assert capfd.readouterr().err == (
            f"error: {workdir}: a run is training in it already (process {os.getpid()} on {os.uname().nodename}); wait "
            "for it, or choose another --workdir\n"
        )
        assert run_binary("recommend", f"--workdir={workdir}", f"--output={tmp_path / 'lists.jsonl'}") == 0


def test_what_killed_runs_left_is_removed(run_binary, trained_workdir, tmp_path):
    """At once where only this run writes. In a report, which others may be writing, and in a shared cache, after a
    day."""
    workdir, shared = shutil.copytree(trained_workdir, tmp_path / "workdir"), tmp_path / "shared"
    shutil.move(workdir / "cache", shared)
    (workdir / "cache").mkdir()
    left = f".{uuid.uuid4().hex}-left"
    places = [workdir, workdir / "cache", workdir / "report", shared]
    for place in places:
        (place / left).touch()
    train = ("train", "--noreport", f"--workdir={workdir}")
    assert run_binary(*train) == 0
    assert [(place / left).exists() for place in places] == [False, False, True, True]
    config = read(workdir / "config.json")
    (workdir / "config.json").write_text(json.dumps(config | {"cache_dir": str(shared)}))
    assert run_binary(*train) == 0
    assert (shared / left).exists()
    for place in places[2:]:
        os.utime(place / left, (time.time() - 25 * 3600,) * 2)
    assert run_binary(*train) == 0
    assert not any((place / left).exists() for place in places)


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
