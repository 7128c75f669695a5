"""A recommender without parameters, through the binaries: nothing is trained, and the rest works as for any model."""

import json

import pytest


@pytest.fixture(scope="module")
def workdir(run_binary, tiny_options, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("untrained") / "workdir"
    assert run_binary("train", *tiny_options, "--config.model=popularity", f"--workdir={workdir}") == 0
    return workdir


def test_it_is_what_the_report_calls_popularity(workdir):
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    assert metrics["model"] == "popularity"
    assert metrics["num_parameters"] == metrics["train_seconds"] == 0
    assert metrics["train_targets_per_second"] is None
    for protocol in ("", "filtered/"):
        for name in ("HR@1", "HR@10", "NDCG@10", "coverage@10", "entropy@10"):
            assert metrics[f"{protocol}{name}"] == metrics[f"popularity/{protocol}{name}"]


def test_it_is_judged_again_and_recommends(workdir, run_binary):
    report = (workdir / "report" / "metrics.json").read_text()
    assert run_binary("evaluate", f"--workdir={workdir}") == 0
    assert (workdir / "report" / "metrics.json").read_text() == report
    file = workdir / "lists.jsonl"
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={file}") == 0
    lists = {tuple(json.loads(line)["items"]) for line in file.read_text().splitlines()}
    assert len(lists) == 1  # Everybody gets the same.


def test_it_needs_and_writes_no_semantic_ids(workdir):
    assert not list(workdir.glob("**/*semantic_ids*"))
    assert json.loads((workdir / "trained_on.json").read_text()).keys() == {"items", "training_sequences"}


def test_it_can_not_be_exported(workdir, run_binary, tmp_path, capsys):
    assert run_binary("export", f"--workdir={workdir}", f"--output={tmp_path / 'exported'}") == 2
    assert capsys.readouterr().err == (
        f'error: {workdir / "config.json"}: holds a run of "popularity"; only simgr can be exported\n'
    )
