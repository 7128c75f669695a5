"""The public Python API: fit, load, and what a Run does."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

import simgr_jax
from simgr_jax import default_config
from simgr_jax.config_files import load_run_config
from simgr_jax.config_keys import with_values
from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.data.interactions import from_frame
from simgr_jax.serving.histories import Histories
from tests.tiny_config import VALUES

OVERRIDES = VALUES | {"evaluation.batch_size": 64}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("api") / "workdir"


@pytest.fixture(scope="module")
def run(workdir) -> simgr_jax.Run:
    return simgr_jax.fit("quickstart", OVERRIDES, workdir=workdir)


def test_a_loaded_run_is_the_one_that_was_trained(run, workdir):
    loaded = simgr_jax.load(workdir)
    assert loaded.config.to_dict() == run.config.to_dict()
    np.testing.assert_array_equal(loaded.item_vectors(), run.item_vectors())


def test_evaluate_returns_the_metrics_of_the_report_under_both_protocols(run, workdir):
    metrics = run.evaluate()
    assert metrics == json.loads((workdir / "report" / "metrics.json").read_text())
    names = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "entropy@10", "coverage@10")
    for ranker in ("", "popularity/", "oracle/"):
        assert all(f"{ranker}{protocol}{name}" in metrics for protocol in ("", "filtered/") for name in names)
    assert run.evaluate("validation")["split"] == "validation"
    for split in ("train", "", None):
        with pytest.raises(simgr_jax.UserError, match="is unknown; choose one of validation, test"):
            run.evaluate(split)


def test_filtered_lists_hold_no_item_of_the_history(run):
    items, _ = run.lists(run.split.test, 10, filter_history=True)
    for history, row in zip(run.split.test.histories, items, strict=True):
        assert not set(history.tolist()) & set(row.tolist())


def test_recommend_gives_users_of_the_data_their_lists(run):
    items, scores = run.lists(run.cases(), 7)
    ids = run.dataset.item_ids
    histories = [[ids[item] for item in history] for history in run.dataset.sequences]
    found = run.recommend(histories, k=7)
    assert found.items == [[ids[item] for item in row] for row in items]
    np.testing.assert_array_equal(found.scores, scores)
    assert found[3] == list(zip(found.items[3], found.scores[3].tolist(), strict=True))
    assert len(list(found)) == len(found) == 200


def test_unknown_ids_are_left_out_counted_and_reported(run):
    ids = run.dataset.item_ids
    known = run.recommend([[ids[4], ids[9]]], k=5)
    with pytest.warns(UserWarning, match="2 ids of the histories are not in the catalog"):
        found = run.recommend([["nobody's", ids[4], "nothing", ids[9]]], k=5)
    assert found.items == known.items and found.unknown == 2 and known.unknown == 0


def test_a_history_without_known_items_gets_the_most_popular(run):
    ids, counts = run.dataset.item_ids, np.bincount(run.split.train.values, minlength=60)
    found = run.recommend([[], [ids[0]]], k=3)
    assert found.items[0] == [ids[item] for item in np.argsort(-counts, kind="stable")[:3]]
    assert found.popular == [0] and np.isnan(found.scores[0]).all()


def test_a_frame_gives_a_frame(run):
    ids = run.dataset.item_ids
    frame = pl.DataFrame({"user": ["u", "v", "u"], "item": [ids[1], ids[2], ids[3]], "timestamp": [5, 1, 2]})
    found = run.recommend(frame, k=4)
    assert found.columns == ["user", "rank", "item", "score"] and len(found) == 8
    as_lists = run.recommend([[ids[2]], [ids[3], ids[1]]], k=4)  # In the order of time.
    assert found.filter(pl.col("user") == "u")["item"].to_list() == as_lists.items[1]
    assert found.filter(pl.col("user") == "v")["item"].to_list() == as_lists.items[0]
    with pytest.raises(simgr_jax.UserError, match="no column 'item'"):
        run.recommend(frame.drop("item"))


def test_items_of_a_frame_at_the_same_time_are_ordered_as_in_training(run):
    ids = run.dataset.item_ids
    rows = [(user, item, 7) for user in ("u", "v") for item in ids[:9]]
    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    frame = pl.DataFrame(rows, schema, orient="row")
    trained = from_frame(frame, "x")
    read = Histories.read(frame.reverse(), run.dataset, run.config.data.log)
    for user, items in zip(read.users, read.sequences, strict=True):
        expected = trained.sequences[trained.user_ids.index(user)]
        assert [ids[item] for item in items] == [trained.item_ids[item] for item in expected]


def test_a_pandas_frame_gives_a_pandas_frame(run):
    pandas = pytest.importorskip("pandas")
    found = run.recommend(pandas.DataFrame({"user": [7], "item": [run.dataset.item_ids[1]]}), k=2)
    assert isinstance(found, pandas.DataFrame) and found["user"].tolist() == [7, 7]


def test_scores_are_the_dot_products_of_user_and_item_vectors(run):
    ids = run.dataset.item_ids
    histories = [[ids[1], ids[2]], [], [ids[5]]]
    users, items = run.user_vectors(histories), run.item_vectors()
    assert not users[1].any()
    found = run.recommend(histories, k=60)
    for row in (0, 2):
        scores = dict(found[row])
        for item, score in zip(ids, items @ users[row], strict=True):
            assert scores[item] == pytest.approx(score, abs=1e-5)


def test_histories_longer_than_the_model_reads_are_cut_but_filtered_whole(run):
    ids = run.dataset.item_ids
    found = run.recommend([ids[:50]], k=10, filter_history=True)
    assert set(found.items[0]) == set(ids[50:])
    newest = run.recommend([ids[30:50]], k=10)
    assert run.recommend([ids[:50]], k=10).items == newest.items


@pytest.mark.parametrize("k", [0, 61, 2.5, None])
def test_a_list_longer_than_the_catalog_is_refused(run, k):
    with pytest.raises(simgr_jax.UserError, match=f"k: can't be {k}; give a number from 1 to 60"):
        run.recommend([[run.dataset.item_ids[0]]], k=k)


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (["B7"], "a string is not a history"),
        ("B7", "a str is not a list of histories"),
        (None, "a NoneType is not a list of histories"),
        ([1, 2], "a int is not a history"),
        ([None], "a NoneType is not a history"),
        ([{"B7"}], "a set is not a history"),
        (pl.DataFrame({"user": [1, 2], "item": ["B7", None]}), "1 rows have no 'item'"),
        (pl.DataFrame({"user": [1], "item": ["B7"], "timestamp": ["10"]}), "column 'timestamp' is of type String"),
        (pl.DataFrame({"user": [1], "item": [["B7"]]}), "column 'item' is of type List"),
    ],
)
def test_what_is_not_a_history_is_refused(run, histories, message):
    with pytest.raises(simgr_jax.UserError, match=message):
        run.recommend(histories)


def test_histories_may_be_generated(run):
    histories = [[run.dataset.item_ids[4]], [run.dataset.item_ids[9]]]
    assert run.recommend((history for history in histories), k=3).items == run.recommend(histories, k=3).items


def test_export_writes_the_folder(run, tmp_path):
    run.export(tmp_path / "exported")
    assert (tmp_path / "exported" / "item_index" / "score.py").exists()
    with pytest.raises(simgr_jax.UserError, match="exists already"):
        run.export(tmp_path / "exported")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.epoch": 1},
            "config.training.epoch: the config has no such key; did you mean config.training.epochs",
        ),
        ({"training.epochs": "many"}, "config.training.epochs: 'many' is not of type int; give a value like 10"),
        ({"model": "sasrec", "simgr.temperature": 5.0}, 'config.simgr.temperature: is not read by model "sasrec"'),
        ({"data.log.items_id": "sku"}, "config.data.log.items_id: is not read without config.data."),
        (
            {"data.format": "log", "data.log.keep_cold_items": True},
            "config.data.log.keep_cold_items: is not read without config.data.log.items_file",
        ),
        ({"data.recbole.user": "id"}, "config.data.recbole.user: is not read without config.data.format=recbole"),
        ({"model": "vae"}, 'config.model: "vae" is unknown; choose one of simgr,'),
        ({"evaluation.ks": (1, 5)}, "config.evaluation.ks: can't be (1, 5); give different whole numbers"),
        ({"optimizer.learning_rate": None}, "config.optimizer.learning_rate: None is not of type float"),
        ({"training.epochs": True}, "config.training.epochs: True is not of type int"),
    ],
)
def test_bad_overrides_are_refused(overrides, message, tmp_path):
    with pytest.raises(simgr_jax.UserError) as caught:
        simgr_jax.fit("quickstart", overrides, workdir=tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_epochs_after_early_stopping_need_more_patience(tmp_path):
    """With the first config the run is finished. What is refused changes no file."""
    stopping = OVERRIDES | {"training.epochs": 10, "training.patience": 1, "optimizer.learning_rate": 1e-12}

    def train(epochs, patience):
        simgr_jax.fit(
            "quickstart", stopping | {"training.epochs": epochs, "training.patience": patience}, workdir=tmp_path
        )
        return [line["step"] for line in simgr_jax.load(tmp_path).log() if "validation/NDCG@10" in line]

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    stopped = train(10, 1)
    assert len(stopped) == 2 and train(10, 1) == stopped
    before = files()
    with pytest.raises(simgr_jax.UserError) as caught:
        train(20, 1)
    assert str(caught.value) == (
        f"config.training.patience: the run here stopped at step {stopped[-1]}, because validation had not got better; "
        "raise it above 1 to go on"
    )
    assert files() == before
    assert len(train(20, 2)) > 2


def test_more_ks_give_more_metrics(run, workdir):
    longer = simgr_jax.Run.load(workdir, {"evaluation.ks": (1, 10, 20)})
    cases = run.split.test
    assert isinstance(cases, EvaluationCases) and isinstance(cases.histories, Sequences)
    metrics = longer.evaluate()
    assert metrics["HR@20"] >= metrics["HR@10"] and "HR@5" not in metrics
    assert metrics["NDCG@10"] == pytest.approx(run.evaluate()["NDCG@10"])


@pytest.mark.parametrize("model", ["popularity", "item_knn", "simgr"])
def test_items_without_interactions_are_recommended_if_the_catalog_keeps_them(model, tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", time) for user in range(60) for time, item in enumerate(generator.integers(0, 30, 5))
    ]
    pl.DataFrame(rows, ["user", "item", "timestamp"], orient="row").write_csv(tmp_path / "log.csv")
    items = {"item": [f"i{item}" for item in range(40)], "title": [f"word{item} kind{item % 5}" for item in range(40)]}
    pl.DataFrame(items).write_csv(tmp_path / "items.csv")
    read = {"format": "log", "path": tmp_path / "log.csv"}
    read |= {"log.items_file": tmp_path / "items.csv", "log.keep_cold_items": True}
    values = {f"data.{key}": value for key, value in read.items()}
    values |= {key: value for key, value in OVERRIDES.items() if not key.startswith("data.")}
    values |= {"model": model, "semantic_ids.embeddings.names": ("tfidf", "interactions")}
    config = with_values(load_run_config("quickstart"), values)
    run = simgr_jax.fit(config, workdir=tmp_path / "workdir")
    assert run.dataset.num_items == 40
    (listed,) = run.recommend([["i3", "i7"]], k=40).items
    assert sorted(listed) == sorted(items["item"])
    assert np.isfinite([value for value in run.evaluate().values() if isinstance(value, float)]).all()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(simgr_jax.UserError, match="is not there; give the --workdir of a run"):
        simgr_jax.load(tmp_path)


def test_a_config_with_keys_of_its_own_is_refused(tmp_path):
    config = default_config.get_config()
    config.extra = 1
    with pytest.raises(simgr_jax.UserError, match=r"config\.extra: the config has no such key"):
        simgr_jax.fit(config, workdir=tmp_path)


def test_rows_that_the_devices_cant_share_are_refused_where_they_are_used(workdir, run, monkeypatch):
    monkeypatch.setattr("simgr_jax.run.sharding.shards", lambda axis: 3)
    again = simgr_jax.load(workdir)
    with pytest.raises(simgr_jax.UserError, match=r"training\.batch_rows: \d+ can't be split over the 3 devices"):
        again.batch_rows  # noqa: B018
    with pytest.raises(simgr_jax.UserError, match=r"config\.evaluation\.batch_size: 64 can't be split"):
        again.ranker  # noqa: B018
