import dataclasses
import io
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.evaluation import metrics, report, report_pictures
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.evaluation.report import Judged
from simgr_jax.models import popularity
from simgr_jax.ops.top_k import Ranking

NUM_ITEMS = 40
FACTS = {"model": "simgr", "dataset": "tiny", "split": "test", "num_users": 60, "num_cases": 60}
FACTS |= {"num_items": np.int64(NUM_ITEMS)}
LOG = [
    {"step": 10, "train/loss": 3.0, "train/targets_per_second": 100.0},
    {"step": 20, "train/loss": float("nan")},
    {"step": 20, "validation/NDCG@10": 0.1, "validation/HR@10": 0.2},
    {"step": 30, "validation/NDCG@10": 0.3, "validation/HR@10": 0.4},
    {"step": 40, "validation/NDCG@10": 0.2, "validation/HR@10": 0.5},
]


def random_ranking(generator, cases):
    items = np.stack([generator.permutation(NUM_ITEMS)[:10] for _ in cases.targets]).astype(np.int32)
    ranks = generator.integers(1, NUM_ITEMS, size=len(cases)).astype(np.float32)
    return Ranking(items, np.zeros_like(items, np.float32), ranks)


@pytest.fixture(scope="module")
def judged():
    """Rankings of 60 cases by a random model and by popularity."""
    generator = np.random.default_rng(0)
    train = Sequences.from_lists([generator.integers(0, 30, size=6) for _ in range(60)])
    targets = generator.integers(0, NUM_ITEMS, size=60).astype(np.int32)
    histories = Sequences.from_lists([[0] * n for n in generator.integers(1, 30, size=60)])
    cases = EvaluationCases(np.arange(60, dtype=np.int32), histories, targets)
    rankings = {
        "model": {LEFT_IN: random_ranking(generator, cases), FILTERED: random_ranking(generator, cases)},
        "popularity": {
            LEFT_IN: popularity.rank(train, NUM_ITEMS, targets, 10),
            FILTERED: popularity.rank_without_history(train, NUM_ITEMS, cases, 10),
        },
    }
    return Judged(FACTS, rankings, cases, train, NUM_ITEMS)


def write(folder, judged, log=()):
    """The report's metrics, and what it prints."""
    output = io.StringIO()
    values = report.write_report(folder, judged, log, console=Console(file=output, width=80))
    return values, output.getvalue()


def test_metrics_json_is_one_flat_object_with_the_contract_keys(tmp_path, judged):
    values, _ = write(tmp_path / "report", judged)
    written = json.loads((tmp_path / "report/metrics.json").read_text())
    assert written == values
    assert written["num_items"] == NUM_ITEMS and written["model"] == "simgr"
    for prefix, name in (("", "model"), ("popularity/", "popularity")):
        for protocol, ranking in judged.rankings[name].items():
            expected = metrics.summarize(ranking.target_rank, ranking.items, NUM_ITEMS)
            for metric in metrics.names():
                key = f"{prefix}{protocol}{metric}"
                assert written[key] == expected[metric]
                assert written[f"{key}/ci95_low"] <= expected[metric] <= written[f"{key}/ci95_high"]
    assert {"NDCG@10", "filtered/NDCG@10", "popularity/NDCG@10", "popularity/filtered/NDCG@10"} <= set(written)
    assert not any(isinstance(value, dict | list) for value in written.values())


def test_a_report_says_how_many_targets_tie_in_time_with_the_item_before(tmp_path, judged):
    values, output = write(tmp_path, judged)
    assert values["tied_targets"] is None and "a hash" not in output  # The data has no times.
    with_ties = lambda ties: judged._replace(cases=dataclasses.replace(judged.cases, tied=np.arange(60) < ties))  # noqa: E731
    values, output = write(tmp_path, with_ties(0))
    assert values["tied_targets"] == 0 and "a hash" not in output
    values, output = write(tmp_path, with_ties(15))
    assert values["tied_targets"] == 0.25
    assert "25.0% of targets tie in time with the item before; a hash decides their order\n" in output


def test_a_report_has_the_ks_that_are_asked_for(tmp_path, judged):
    values, output = write(tmp_path, judged._replace(ks=(3, 10)))
    names = {key for key in values if "@" in key and "/" not in key}
    assert names == {"HR@3", "HR@10", "NDCG@3", "NDCG@10", "entropy@10", "coverage@10"}
    assert " NDCG@3 " in output and " NDCG@5 " not in output


def test_the_same_evaluation_gives_the_same_files(tmp_path, judged):
    write(tmp_path / "a", judged, log=LOG)
    write(tmp_path / "b", judged, log=LOG)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["exposure.png", "learning_curves.png", "metrics.json", "slices.json", "slices.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pictures_can_be_read(tmp_path, judged):
    write(tmp_path, judged, log=LOG)
    for path in tmp_path.glob("*.png"):
        height, width, _ = imread(path).shape
        assert height > 400 and width > 700


def test_slices_cover_every_case_once_in_each_grouping(tmp_path, judged):
    write(tmp_path, judged)
    slices = json.loads((tmp_path / "slices.json").read_text())
    assert set(slices) == {"model", "popularity"}
    for rows in slices.values():
        for by in ("target popularity", "history length"):
            assert sum(row["num_cases"] for row in rows if row["by"] == by) == 60


def test_the_table_has_each_metric_of_each_ranking_and_protocol_with_its_interval(tmp_path, judged):
    values, output = write(tmp_path, judged)
    assert "simgr" in output and "popularity" in output and "tiny · test" in output
    left_in, taken_out = output.split("history left in")[1].split("history taken out")
    for protocol, lines in ((LEFT_IN, left_in.splitlines()), (FILTERED, taken_out.splitlines())):
        for metric in metrics.names():
            row = next(line for line in lines if f" {metric} " in line)
            key = f"{protocol}{metric}"
            half_width = values[f"{key}/ci95_high"] - values[key]
            assert f"{values[key]:.4f}" in row and f"{values[f'popularity/{key}']:.4f}" in row
            if metric.startswith("HR"):
                assert f"± {half_width:.4f}" in row


def test_a_table_of_three_rankings_fits_80_columns(judged):
    judged = judged._replace(rankings=judged.rankings | {"oracle": judged.rankings["model"]})
    table = report.metrics_table(report.collect_metrics(judged), list(judged.rankings), judged.ks)
    assert Console(width=200).measure(table).maximum <= 80


def test_learning_curves_mark_the_best_validation_and_skip_values_that_are_not_finite():
    loss_axes, accuracy_axes = report_pictures.draw_learning_curves(LOG).axes
    assert loss_axes.lines[0].get_xydata().tolist() == [[10, 3.0]]
    assert [text.get_text() for text in accuracy_axes.texts] == ["best NDCG@10 0.3000\nat step 30"]


@pytest.mark.parametrize("log", [LOG[:1], LOG[2:], [{"step": 1, "validation/NDCG@10": math.nan}]])
def test_a_log_with_one_kind_of_line_is_drawn(tmp_path, judged, log):
    write(tmp_path, judged, log=log)
    assert (tmp_path / "learning_curves.png").stat().st_size > 0


def test_without_a_log_there_are_no_learning_curves(tmp_path, judged):
    write(tmp_path, judged)
    assert not (tmp_path / "learning_curves.png").exists()


def test_gini_of_known_distributions():
    assert report_pictures.gini(np.full(100, 7)) == pytest.approx(0)
    assert report_pictures.gini(np.eye(100, dtype=int)[3] * 50) == pytest.approx(0.99)
    # The definition: the mean absolute difference of all pairs, divided by twice the mean.
    counts = np.random.default_rng(0).integers(0, 20, size=31)
    pairs = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    assert report_pictures.gini(counts) == pytest.approx(pairs)


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path, judged):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write(tmp_path / "file" / "report", judged)
