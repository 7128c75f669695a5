"""`simgr_jax.evaluate`, as the binary."""

import json
import shutil

import numpy as np
import pytest

from simgr_jax.evaluation.metrics import summarize

PROTOCOLS = ("", "filtered/")
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "entropy@10", "coverage@10")
FACTS = {"model", "dataset", "split", "num_users", "num_cases", "num_items", "tied_targets"}
COST = {"num_parameters", "train_seconds", "train_targets_per_second"}


def read(folder, name="metrics.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    return shutil.copytree(trained_workdir, tmp_path / "workdir")


def test_metrics_json_is_the_contract(trained_workdir):
    metrics = read(trained_workdir / "report")
    rankers = ("", "popularity/", "oracle/")
    named = [f"{ranker}{protocol}{metric}" for ranker in rankers for protocol in PROTOCOLS for metric in METRICS]
    intervals = [f"{name}/ci95_{end}" for name in named for end in ("low", "high")]
    assert metrics.keys() == FACTS | COST | set(named) | set(intervals)
    assert (metrics["model"], metrics["dataset"], metrics["split"]) == ("simgr", "synthetic", "test")
    assert (metrics["num_users"], metrics["num_cases"], metrics["num_items"]) == (200, 200, 60)
    assert min(metrics[key] for key in COST) > 0
    assert all(type(metrics[name]) is float for name in named)
    for name in named:
        assert metrics[f"{name}/ci95_low"] <= metrics[name] <= metrics[f"{name}/ci95_high"]
    assert metrics["oracle/HR@10"] > metrics["popularity/HR@10"]


def test_a_workdir_is_as_designed(trained_workdir):
    there = {path.relative_to(trained_workdir).as_posix() for path in trained_workdir.rglob("*")}
    assert {"config.json", "metrics.jsonl", "checkpoints", "semantic_ids.json", "trained_on.json"} <= there
    assert "semantic_ids.npz" in there
    assert {f"report/{name}.png" for name in ("learning_curves", "exposure", "slices")} <= there
    assert any(name.startswith("tensorboard/events.") for name in there)
    lines = [json.loads(line) for line in (trained_workdir / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/NDCG@10" in line for line in lines)


def test_a_workdir_evaluated_again_gives_the_same_report_timings_included(run_binary, workdir):
    before = (workdir / "report" / "metrics.json").read_bytes()
    shutil.rmtree(workdir / "report")
    assert run_binary("evaluate", f"--workdir={workdir}") == 0
    assert (workdir / "report" / "metrics.json").read_bytes() == before
    assert not (workdir / "report_validation").exists()


def test_the_ranking_is_kept_for_paired_comparisons(trained_workdir):
    metrics = read(trained_workdir / "report")
    with np.load(trained_workdir / "report" / "ranking.npz", allow_pickle=False) as ranking:
        for protocol, prefix in zip(PROTOCOLS, ("", "filtered_"), strict=True):
            items, ranks = ranking[f"{prefix}items"], ranking[f"{prefix}target_rank"]
            assert (items.shape, items.dtype, ranks.shape, ranks.dtype) == ((200, 10), np.int32, (200,), np.float32)
            assert summarize(ranks, items, 60) == {metric: metrics[f"{protocol}{metric}"] for metric in METRICS}


@pytest.fixture
def moved(run_binary, workdir, tmp_path):
    """A workdir whose config has places of another machine, and where its data and cache are here."""
    (data,) = (workdir / "cache").glob("synthetic-*/")
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(workdir / "cache")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"], config["cache_dir"] = "/proc/nowhere/data", "/proc/nowhere/cache"
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir, (f"--data_path={tmp_path / 'data'}", f"--cache_dir={tmp_path / 'cache'}")


def test_a_run_can_be_evaluated_where_its_data_have_moved_to(run_binary, moved, capfd):
    workdir, places = moved
    before, config = (workdir / "report" / "metrics.json").read_bytes(), (workdir / "config.json").read_bytes()
    shutil.rmtree(workdir / "report")
    assert run_binary("evaluate", f"--workdir={workdir}") == 2
    assert capfd.readouterr().err.startswith("error: ")
    assert run_binary("evaluate", f"--workdir={workdir}", *places) == 0
    assert (workdir / "report" / "metrics.json").read_bytes() == before
    assert (workdir / "config.json").read_bytes() == config


@pytest.mark.parametrize("missing", ["data_path", "cache_dir"])
def test_what_has_moved_is_told_one_by_one(run_binary, moved, capfd, missing):
    workdir, places = moved
    places = [place for place in places if missing not in place]
    assert run_binary("evaluate", f"--workdir={workdir}", *places) == 2
    assert "/proc/nowhere" in capfd.readouterr().err


def test_only_a_run_with_an_llm_can_be_told_where_it_is(run_binary, workdir, tmp_path, capfd):
    assert run_binary("evaluate", f"--workdir={workdir}", f"--checkpoint={tmp_path / 'llm'}") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {workdir}: its run has no checkpoint, so config.backbone.checkpoint can't be")


def test_places_are_of_a_workdir(run_binary, root, tmp_path, capfd):
    options = (f"--predictions={tmp_path / 'x.jsonl'}", f"--config={root}/configs/quickstart.py", "--data_path=there")
    assert run_binary("evaluate", *options) == 2
    assert capfd.readouterr().err.startswith(
        "error: --predictions: is judged on the data of --config; give --config.data.path"
    )


def test_a_run_can_recommend_and_be_exported_where_its_data_have_moved_to(run_binary, moved, tmp_path):
    workdir, places = moved
    for binary in ("recommend", "export"):
        assert run_binary(binary, f"--workdir={workdir}", f"--output={tmp_path / binary}", *places) == 0


def test_validation_has_a_report_of_its_own(run_binary, workdir):
    before = (workdir / "report" / "metrics.json").read_bytes()
    assert run_binary("evaluate", f"--workdir={workdir}", "--split=validation") == 0
    metrics = read(workdir / "report_validation")
    assert metrics["split"] == "validation"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert metrics["NDCG@10"] == max(line.get("validation/NDCG@10", -1) for line in lines)
    assert (workdir / "report" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("split", ["test", pytest.param("validation", marks=pytest.mark.slow)])
def test_recommendations_judged_as_predictions_score_as_the_model_does(
    run_binary, tiny_options, workdir, tmp_path, split
):
    """The lists hold the whole catalog, so that none has fewer than 10 items once history items are taken out."""
    file = tmp_path / "theirs.jsonl"
    assert run_binary("evaluate", f"--workdir={workdir}", f"--split={split}") == 0
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={file}", f"--split={split}", "--k=60") == 0
    assert run_binary("evaluate", *tiny_options, f"--predictions={file}", f"--split={split}") == 0
    own = read(workdir / ("report" if split == "test" else "report_validation"))
    judged = read(tmp_path / "theirs.jsonl.report")
    assert judged.keys() == own.keys()
    assert judged.pop("model") == "theirs" and own.pop("model") == "simgr"
    assert {judged.pop(key) for key in COST} == {None}
    assert judged == {key: value for key, value in own.items() if key not in COST}


def test_short_lists_are_judged_with_a_warning(run_binary, tiny_options, workdir, tmp_path, caplog):
    file = tmp_path / "short.jsonl"
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={file}", "--split=test", "--k=5") == 0
    assert run_binary("evaluate", *tiny_options, f"--predictions={file}") == 0
    judged, own = read(tmp_path / "short.jsonl.report"), read(workdir / "report")
    assert judged["HR@5"] == judged["HR@10"] == own["HR@5"] < own["HR@10"]
    assert "200 of 200 lists have fewer than 10 items" in caplog.text
