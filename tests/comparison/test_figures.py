import numpy as np
import pytest
from comparisons import NUM_ITEMS, NUM_USERS, config, rates, write_report

from simgr_jax.comparison.figures import Finished, collect
from simgr_jax.comparison.rows import read
from simgr_jax.comparison.runs import Trial, Tuning
from simgr_jax.comparison.speed import Speeds
from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.significance import holm, paired_difference
from simgr_jax.workdir.read_files import read_json_object

ONE_USER = {"num_users": 1}
SKILLS = {"a": 1.0, "b": 3.0, "same": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three rows, of which a and b have two seeds and "same" ranks as a's first, and all rankings."""
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
        workdirs = {seed: folder / f"{row.name}-{seed}" for seed in row.seeds}
        rankings[row.name] = [write_report(workdir, seed, SKILLS[row.name]) for seed, workdir in workdirs.items()]
        finished[row.name] = Finished(row, Tuning(trials, 1) if row.name == "a" else Tuning(), workdirs)
    return finished, rankings


@pytest.fixture(scope="module")
def figures(finished):
    speeds = {"a": Speeds([10.0, 30.0, 20.0], [0.5, 0.1, 0.2]), "b": Speeds([5.0] * 3, [1.0] * 3)}
    return collect(finished[0], "a", speeds)


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


def test_of_one_seed_metrics_and_intervals_are_the_reports(finished, figures):
    (ranking,) = finished[1]["same"]
    arrays = ranking.target_rank, ranking.items, NUM_ITEMS
    expected = metrics.summarize(*arrays) | metrics.confidence_intervals(*arrays, ranking.users)
    model = figures["models"]["same"]
    assert {key: model[key] for key in expected} == pytest.approx(expected)


def test_of_several_seeds_metrics_are_means(finished, figures):
    for name in ("a", "b"):
        seeds = [metrics.summarize(one.target_rank, one.items, NUM_ITEMS) for one in finished[1][name]]
        model = figures["models"][name]
        for metric in metrics.METRICS:
            assert model[f"{metric}/seeds"] == [seed[metric] for seed in seeds]
            assert model[metric] == pytest.approx(np.mean(model[f"{metric}/seeds"]))
            assert model[f"{metric}/ci95_low"] <= model[metric] <= model[f"{metric}/ci95_high"]


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
    a = finished[0]["a"]
    same = {"same": finished[0]["same"], "a": a._replace(workdirs={0: a.workdirs[0]})}
    figures = collect(same, "a", {})
    assert (figures["models"]["a"]["seeds"], figures["models"]["a"]["missing_seeds"]) == ([0], [1])
    difference = figures["models"]["same"]["NDCG@10/difference"]
    assert (difference["mean"], difference["p"], difference["p_holm"]) == (0, 1, 1)


def test_without_the_reference_nothing_is_tested(finished):
    figures = collect({name: finished[0][name] for name in ("b", "same")}, "a", {})
    assert not any("difference" in key for model in figures["models"].values() for key in model)


def test_one_user_is_no_sample(finished, monkeypatch):
    monkeypatch.setattr("simgr_jax.comparison.figures.read_json_object", lambda path: read_json_object(path) | ONE_USER)
    figures = collect(finished[0], "a", {})
    assert figures["num_users"] == 1
    assert not any("difference" in key for model in figures["models"].values() for key in model)
