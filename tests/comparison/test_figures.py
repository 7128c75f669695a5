from types import SimpleNamespace

import numpy as np
import pytest
from comparisons import NUM_ITEMS, NUM_USERS, config, rates, write_report

from simgr_jax.comparison.figures import collect
from simgr_jax.comparison.rows import read
from simgr_jax.comparison.runs import Trial, Tuning
from simgr_jax.comparison.speed import Speeds
from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.significance import holm, paired_difference
from simgr_jax.run import Run

KS = (1, 5, 10)
SKILLS = {"a": 1.0, "b": 3.0, "same": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three rows with their finished runs, and all rankings. Rows a and b have two seeds, and "same" ranks as a's first
    seed does."""
    folder = tmp_path_factory.mktemp("figures")
    rows = read(config(a={"seeds": (0, 1), "trials": rates(0.1, 0.2)}, b={"seeds": (0, 1)}, same={}))
    failed = Trial({"optimizer.learning_rate": 0.1}, None, "diverged")
    trials = (
        failed,
        Trial({"optimizer.learning_rate": 0.2}, 0.5, full_score=0.6),
        Trial({"optimizer.learning_rate": 0.3}, 0.4, full_failure="why"),
    )
    finished, rankings = {}, {}
    for row in rows:
        found = {seed: Run(row.config, folder / f"{row.name}-{seed}") for seed in row.seeds}
        rankings[row.name] = [write_report(run.workdir, seed, SKILLS[row.name]) for seed, run in found.items()]
        finished[row.name] = (row, Tuning(trials, 1) if row.name == "a" else Tuning(), found)
    return finished, rankings


def figures_of(finished, reference, speeds):
    """finished: (row, tuning, runs by seed), by name."""
    runs = SimpleNamespace(
        finished=lambda row: finished[row.name][2],
        tuning=lambda row: finished[row.name][1],
    )
    return collect([row for row, *_ in finished.values()], runs, reference, speeds, KS)


@pytest.fixture(scope="module")
def figures(finished):
    speeds = {"a": Speeds([10.0, 30.0, 20.0], [0.5, 0.1, 0.2]), "b": Speeds([5.0] * 3, [1.0] * 3)}
    return figures_of(finished[0], "a", speeds)


def test_facts_and_settings(figures):
    assert (figures["dataset"], figures["split"], figures["reference"]) == ("tiny", "test", "a")
    assert (figures["num_users"], figures["num_items"]) == (NUM_USERS, NUM_ITEMS)
    assert list(figures["models"]) == ["a", "b", "same"]
    model = figures["models"]["a"]
    assert (model["family"], model["model"]) == ("a kind", "simgr")
    assert (model["seeds"], model["missing_seeds"]) == ([0, 1], [])
    assert model["trials"] == [
        {"values": {"optimizer.learning_rate": 0.1}, "failed": "diverged"},
        {"values": {"optimizer.learning_rate": 0.2}, "validation/NDCG@10": 0.5, "validation/NDCG@10/full": 0.6},
        {"values": {"optimizer.learning_rate": 0.3}, "validation/NDCG@10": 0.4, "failed/full": "why"},
    ]
    assert model["chosen"] == {"optimizer.learning_rate": 0.2}
    assert (model["num_parameters"], model["train_seconds"]) == (1000, 10.5)
    assert (model["users_per_second"], model["catalog_seconds"]) == (20, 0.2)
    assert model["catalog_seconds/rounds"] == [0.5, 0.1, 0.2]
    assert figures["models"]["same"]["users_per_second"] is None


def by_protocol(figures):
    """The metrics of each protocol, by their plain names."""
    filtered = {key.removeprefix("filtered/"): value for key, value in figures.items() if key.startswith("filtered/")}
    return {"": figures, "filtered/": filtered}


def test_metrics_and_intervals_of_one_seed_are_the_reports(finished, figures):
    (ranking,) = finished[1]["same"]
    found = by_protocol(figures["models"]["same"])
    for protocol, (ranks, items) in ranking.by_protocol().items():
        arrays = ranks, items, NUM_ITEMS
        expected = metrics.summarize(*arrays) | metrics.confidence_intervals(*arrays, ranking.users)
        assert {key: found[protocol][key] for key in expected} == pytest.approx(expected)


def test_metrics_of_several_seeds_are_means(finished, figures):
    for name in ("a", "b"):
        for protocol, model in by_protocol(figures["models"][name]).items():
            rankings = [one.by_protocol()[protocol] for one in finished[1][name]]
            seeds = [metrics.summarize(*ranking, NUM_ITEMS) for ranking in rankings]
            for metric in metrics.names():
                assert model[f"{metric}/seeds"] == [seed[metric] for seed in seeds]
                assert model[metric] == pytest.approx(np.mean(model[f"{metric}/seeds"]))
                assert model[f"{metric}/ci95_low"] <= model[metric] <= model[f"{metric}/ci95_high"]


def test_the_ks_are_the_configs(finished, figures):
    (row, tuning, runs) = finished[0]["same"]
    found = collect([row], SimpleNamespace(finished=lambda _: runs, tuning=lambda _: tuning), "same", {}, ks=(3, 10))
    assert found["ks"] == [3, 10] and figures["ks"] == [1, 5, 10]
    model = found["models"]["same"]
    assert {"HR@3", "NDCG@3", "HR@10", "filtered/NDCG@3"} <= model.keys() and "HR@5" not in model
    assert model["NDCG@10"] == figures["models"]["same"]["NDCG@10"]


def test_a_row_without_finished_runs_or_tuning_is_left_out(finished):
    (row, tuning, runs) = finished[0]["same"]
    for left_out in ({"b": (finished[0]["b"][0], None, runs)}, {"b": (finished[0]["b"][0], tuning, {})}):
        assert list(figures_of({"same": (row, tuning, runs)} | left_out, "same", {})["models"]) == ["same"]


def test_an_interval_of_several_seeds_is_that_of_their_mean_over_users(finished, figures):
    gains = np.mean([metrics.gains(one.target_rank, 10) for one in finished[1]["b"]], axis=0)
    model = figures["models"]["b"]
    half_width = (model["NDCG@10/ci95_high"] - model["NDCG@10/ci95_low"]) / 2
    assert half_width == pytest.approx(1.96 * gains.std() / np.sqrt(NUM_USERS), rel=0.1)


def test_the_others_are_tested_against_the_reference(finished, figures):
    """Two rows, two metrics: four tests."""
    tests = []
    for name in ("b", "same"):
        for metric, score in (("NDCG@10", metrics.gains), ("HR@10", metrics.hits)):
            mine, theirs = (
                np.mean([score(one.target_rank, 10) for one in finished[1][model]], axis=0) for model in (name, "a")
            )
            found = figures["models"][name][f"{metric}/difference"]
            expected = paired_difference(mine, theirs, np.arange(NUM_USERS))
            assert {key: found[key] for key in expected._fields} == pytest.approx(expected._asdict())
            difference = figures["models"][name][metric] - figures["models"]["a"][metric]
            assert found["mean"] == pytest.approx(difference)
            tests.append((found["p"], found["p_holm"]))
    p_values, adjusted = zip(*tests, strict=True)
    assert adjusted == pytest.approx(holm(p_values))
    assert "NDCG@10/difference" not in figures["models"]["a"]
    assert figures["models"]["b"]["NDCG@10/difference"]["p_holm"] < 0.05


def test_the_same_ranking_does_not_differ(finished):
    row, tuning, runs = finished[0]["a"]
    figures = figures_of({"same": finished[0]["same"], "a": (row, tuning, {0: runs[0]})}, "a", {})
    assert (figures["models"]["a"]["seeds"], figures["models"]["a"]["missing_seeds"]) == ([0], [1])
    difference = figures["models"]["same"]["NDCG@10/difference"]
    assert (difference["mean"], difference["p"], difference["p_holm"]) == (0, 1, 1)


def test_without_the_reference_nothing_is_tested(finished):
    figures = figures_of({name: finished[0][name] for name in ("b", "same")}, "a", {})
    assert not any("difference" in key for model in figures["models"].values() for key in model)


def test_one_user_is_no_sample(finished, monkeypatch):
    report = Run.report
    monkeypatch.setattr(Run, "report", lambda run: report(run) | {"num_users": 1})
    figures = figures_of(finished[0], "a", {})
    assert figures["num_users"] == 1
    assert not any("difference" in key for model in figures["models"].values() for key in model)
