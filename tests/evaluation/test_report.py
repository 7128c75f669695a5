import io
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.evaluation import metrics, report
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


@pytest.fixture(scope="module")
def evaluation():
    """Rankings of 60 cases by a random model and by popularity, the cases, and the training sequences."""
    generator = np.random.default_rng(0)
    train = Sequences.from_lists([generator.integers(0, 30, size=6) for _ in range(60)])
    targets = generator.integers(0, NUM_ITEMS, size=60).astype(np.int32)
    histories = Sequences.from_lists([[0] * n for n in generator.integers(1, 30, size=60)])
    cases = EvaluationCases(np.arange(60, dtype=np.int32), histories, targets)
    items = np.stack([generator.permutation(NUM_ITEMS)[:10] for _ in targets]).astype(np.int32)
    ranks = generator.integers(1, NUM_ITEMS, size=60).astype(np.float32)
    model = Ranking(items, np.zeros_like(items, np.float32), ranks)
    return {"model": model, "popularity": popularity.rank(train, NUM_ITEMS, targets, 10)}, cases, train


def write(folder, evaluation, **kwargs):
    rankings, cases, train = evaluation
    output = io.StringIO()
    values = report.collect_metrics(FACTS, rankings, np.arange(60), NUM_ITEMS)
    console = Console(file=output, width=80)
    report.write_report(folder, values, rankings, cases, train, console=console, **kwargs)
    return values, output.getvalue()


def test_metrics_json_is_one_flat_object_with_the_contract_keys(tmp_path, evaluation):
    values, _ = write(tmp_path / "report", evaluation)
    written = json.loads((tmp_path / "report/metrics.json").read_text())
    assert written == values
    assert written["num_items"] == NUM_ITEMS and written["model"] == "simgr"
    for prefix, ranking in (("", evaluation[0]["model"]), ("popularity/", evaluation[0]["popularity"])):
        expected = metrics.summarize(ranking.target_rank, ranking.items, NUM_ITEMS)
        for name in metrics.METRICS:
            assert written[f"{prefix}{name}"] == expected[name]
            assert written[f"{prefix}{name}/ci95_low"] <= expected[name] <= written[f"{prefix}{name}/ci95_high"]
    assert not any(isinstance(value, dict | list) for value in written.values())


def test_the_same_evaluation_gives_the_same_files(tmp_path, evaluation):
    write(tmp_path / "a", evaluation, log=LOG)
    write(tmp_path / "b", evaluation, log=LOG)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["exposure.png", "learning_curves.png", "metrics.json", "slices.json", "slices.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pictures_are_pictures(tmp_path, evaluation):
    write(tmp_path, evaluation, log=LOG)
    for path in tmp_path.glob("*.png"):
        height, width, _ = imread(path).shape
        assert height > 400 and width > 700


def test_slices_cover_every_case_once_in_each_grouping(tmp_path, evaluation):
    write(tmp_path, evaluation)
    slices = json.loads((tmp_path / "slices.json").read_text())
    assert set(slices) == {"model", "popularity"}
    for rows in slices.values():
        for by in ("target popularity", "history length"):
            assert sum(row["num_cases"] for row in rows if row["by"] == by) == 60


def test_the_table_has_each_metric_of_each_ranking_with_its_interval(tmp_path, evaluation):
    values, output = write(tmp_path, evaluation)
    assert "simgr" in output and "popularity" in output and "tiny · test" in output
    for name in metrics.METRICS:
        row = next(line for line in output.splitlines() if f" {name} " in line)
        half_width = values[f"{name}/ci95_high"] - values[name]
        assert f"{values[name]:.4f}" in row and f"{values[f'popularity/{name}']:.4f}" in row
        if name.startswith("HR"):
            assert f"± {half_width:.4f}" in row


def test_a_table_of_three_rankings_fits_80_columns(evaluation):
    rankings = evaluation[0] | {"oracle": evaluation[0]["model"]}
    table = report.metrics_table(report.collect_metrics(FACTS, rankings, np.arange(60), NUM_ITEMS))
    assert Console(width=200).measure(table).maximum <= 80


def test_learning_curves_mark_the_best_validation_and_skip_what_is_not_finite():
    loss_axes, accuracy_axes = report.draw_learning_curves(LOG).axes
    assert loss_axes.lines[0].get_xydata().tolist() == [[10, 3.0]]
    assert [text.get_text() for text in accuracy_axes.texts] == ["best NDCG@10 0.3000\nat step 30"]


@pytest.mark.parametrize("log", [LOG[:1], LOG[2:], [{"step": 1, "validation/NDCG@10": math.nan}]])
def test_a_log_of_one_kind_of_line_is_drawn(tmp_path, evaluation, log):
    write(tmp_path, evaluation, log=log)
    assert (tmp_path / "learning_curves.png").stat().st_size > 0


def test_no_log_no_learning_curves(tmp_path, evaluation):
    write(tmp_path, evaluation)
    assert not (tmp_path / "learning_curves.png").exists()


def test_gini_of_known_distributions():
    assert report.gini(np.full(100, 7)) == pytest.approx(0)
    assert report.gini(np.eye(100, dtype=int)[3] * 50) == pytest.approx(0.99)
    # The mean absolute difference of all pairs over twice the mean, its definition.
    counts = np.random.default_rng(0).integers(0, 20, size=31)
    pairs = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    assert report.gini(counts) == pytest.approx(pairs)


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path, evaluation):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write(tmp_path / "file" / "report", evaluation)
