import json
import re

import ml_collections
import numpy as np
import polars as pl
import pytest

from simgr_jax.data import load as load_module
from simgr_jax.data.load import load
from simgr_jax.errors import UserError

SEQUENCES = "u a b c d\nv b c a\nw c b a c\n"


def config_of(**changes):
    config = ml_collections.ConfigDict(
        {
            "format": "p5",
            "path": "",
            "name": "",
            "k_core": 0,
            "split": "leave_one_out",
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
            "log": {
                "user": "user",
                "item": "item",
                "timestamp": "time",
                "items_file": "",
                "items_id": "item",
                "items_text": ("title",),
            },
            "recbole": {"user": "", "item": "", "timestamp": ""},
            "amazon_reviews": {"version": "2014", "category": "Beauty"},
            "synthetic": {"num_users": 50, "num_items": 200, "seed": 3},
        }
    )
    config.update(changes)
    return config


@pytest.fixture
def p5_folder(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "user_sequence.txt").write_text(SEQUENCES)
    (folder / "item_plain_text.txt").write_text("a apple\nb bread\nc cheese\nd date\ne never bought\n")
    return folder


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def assert_same(a, b):
    assert (a.name, a.user_ids, a.item_ids, a.item_texts) == (b.name, b.user_ids, b.item_ids, b.item_texts)
    assert (a.codebook_sizes, a.notes) == (b.codebook_sizes, b.notes)
    pairs = [(a.sequences.values, b.sequences.values), (a.sequences.offsets, b.sequences.offsets)]
    pairs += [(getattr(a, field), getattr(b, field)) for field in ("timestamps", "codes", "parts")]
    for left, right in pairs:
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def write_format(folder, name):
    """Writes data in a format, with all optional files. Returns the config overrides that read it."""
    folder.mkdir()
    if name == "p5":
        (folder / "user_sequence.txt").write_text(SEQUENCES)
    elif name == "lcrec":
        (folder / "x.inter.json").write_text(json.dumps({"0": [0, 1, 2, 0], "1": [1, 2, 0]}))
        (folder / "x.index.json").write_text(json.dumps({str(i): [f"<a_{i}>", f"<b_{9 - i}>"] for i in range(3)}))
        (folder / "x.item.json").write_text(json.dumps({str(i): {"title": f"№ {i}"} for i in range(3)}))
    elif name == "minionerec":
        for part, history, item in (("train", [0, 1], 2), ("valid", [0, 1, 2], 0), ("test", [0, 1, 2, 0], 1)):
            (folder / part).mkdir()
            (folder / part / "x.csv").write_text(f'user_id,history_item_id,item_id\nu,"{history}",{item}\n')
        return {"format": name, "path": str(folder), "split": "given"}
    elif name == "recbole":
        rows = [f"{u}\t{i}\t{t}\n" for t, (u, i) in enumerate(["ua", "ub", "uc", "ud", "va", "vb", "vc"])]
        (folder / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    elif name == "log":
        rows = {"user": list("uuuuvvv"), "item": list("abcdabc"), "time": [1, 2, 3, 4, 1, 2, 3]}
        pl.DataFrame(rows).write_parquet(folder / "log.parquet")
        return {"format": name, "path": str(folder / "log.parquet"), "split": "temporal", "test_fraction": 0.2}
    return {"format": name, "path": str(folder)}


@pytest.mark.parametrize("name", ["p5", "lcrec", "minionerec", "recbole", "log"])
def test_a_second_load_reads_the_same_data_from_the_cache(tmp_path, cache_dir, monkeypatch, name):
    config = config_of(**write_format(tmp_path / "shop", name))
    dataset, split = load(config, cache_dir)
    assert len(split.train) and len(split.validation) and len(split.test)
    assert dataset.name == ("log" if name == "log" else "shop")

    def fail(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(load_module, "_save_dataset", fail)
    again, split_again = load(config, cache_dir)
    assert_same(dataset, again)
    np.testing.assert_array_equal(split.test.histories.values, split_again.test.histories.values)
    assert len(list(cache_dir.iterdir())) == 1


def test_changed_files_or_options_are_read_again(p5_folder, cache_dir):
    config = config_of(path=str(p5_folder))
    assert load(config, cache_dir)[0].num_items == 5
    config.k_core = 2
    assert load(config, cache_dir)[0].item_ids == ["a", "b", "c"]  # d has one interaction, e has none
    config.k_core = 0
    (p5_folder / "user_sequence.txt").write_text(SEQUENCES + "x d a b c\n")
    assert load(config, cache_dir)[0].user_ids == ["u", "v", "w", "x"]
    (p5_folder / "item_plain_text.txt").unlink()
    assert load(config, cache_dir)[0].item_texts is None
    assert len(list(cache_dir.iterdir())) == 4


def test_what_was_left_out_is_said_by_every_run_that_loads_the_data(p5_folder, cache_dir, caplog):
    config = config_of(path=str(p5_folder), k_core=2)
    message = "shop: config.data.k_core=2 leaves out 0 of 3 users, 2 of 5 items and 1 of 11 interactions"
    for _ in range(2):  # The second one reads the cache.
        load(config, cache_dir)
        assert caplog.messages == [message]
        caplog.clear()
    load(config_of(path=str(p5_folder)), cache_dir)
    assert not caplog.messages


def test_another_name_reuses_the_cache(p5_folder, cache_dir):
    load(config_of(path=str(p5_folder)), cache_dir)
    dataset, _ = load(config_of(path=str(p5_folder), name="my shop"), cache_dir)
    assert dataset.name == "my shop"
    assert len(list(cache_dir.iterdir())) == 1


def test_k_core_keeps_the_order_of_sequences_without_timestamps(p5_folder, cache_dir):
    dataset, _ = load(config_of(path=str(p5_folder), k_core=3), cache_dir)
    assert [[dataset.item_ids[i] for i in s] for s in dataset.sequences] == [list("abc"), list("bca"), list("cbac")]


def test_synthetic_data_is_made_once(cache_dir):
    dataset, split = load(config_of(format="synthetic"), cache_dir)
    assert (dataset.name, len(dataset.user_ids), dataset.num_items) == ("synthetic", 50, 200)
    assert len(split.test) == 50
    files = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    assert_same(dataset, load(config_of(format="synthetic"), cache_dir)[0])
    assert files == {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    other, _ = load(config_of(format="synthetic", synthetic={"seed": 4}), cache_dir)
    assert other.sequences.values.tolist() != dataset.sequences.values.tolist()


def test_synthetic_data_may_be_kept_in_a_folder_of_the_users(tmp_path, cache_dir):
    load(config_of(format="synthetic", path=str(tmp_path / "embedded")), cache_dir)
    assert (tmp_path / "embedded/user_sequence.txt").exists()


def test_paths_may_start_with_a_tilde(tmp_path, cache_dir, p5_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(config_of(path="~/shop"), cache_dir)[0].item_texts[0] == "apple"
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"u,{item},{i}\n" for i, item in enumerate("abcd")))
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},x{item}\n" for item in "abcd"))
    config = config_of(format="log", path="~/log.csv")
    config.log.items_file = "~/items.csv"
    assert load(config, cache_dir)[0].item_texts == ["xa", "xb", "xc", "xd"]
    with pytest.raises(UserError, match=r"^~no_such_user/shop: no such folder"):
        load(config_of(path="~no_such_user/shop"), cache_dir)


def test_raw_amazon_reviews_are_loaded_and_cached(tmp_path, cache_dir):
    reviews = [
        {"reviewerID": f"U{u}", "asin": f"B{(u + t) % 4}", "unixReviewTime": 1000 + t, "overall": 5.0}
        for u in range(3)
        for t in range(4)
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/reviews_Beauty.json").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    metadata = "".join(f"{{'asin': 'B{i}', 'title': 'Soap {i}'}}\n" for i in range(4))
    (tmp_path / "raw/meta_Beauty.json").write_text(metadata)
    config = config_of(format="amazon_reviews", path=str(tmp_path / "raw"))
    dataset, split = load(config, cache_dir)
    assert dataset.name == "amazon_2014_Beauty"
    assert dataset.item_ids == ["B0", "B1", "B2", "B3"]
    assert all("Soap" in text for text in dataset.item_texts)
    assert [[dataset.item_ids[i] for i in s] for s in dataset.sequences][1] == ["B1", "B2", "B3", "B0"]
    assert len(split.test) == 3
    assert_same(dataset, load(config, cache_dir)[0])
    assert len(list(cache_dir.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "parquet"}, "config.data.format: 'parquet' is unknown; choose from p5, lcrec,"),
        ({"split": "random"}, "config.data.split: 'random' is unknown; choose from leave_one_out,"),
        ({"k_core": -1}, "config.data.k_core: -1 is negative"),
        ({"path": ""}, "config.data.path: not set; set it to the folder"),
        ({"path": "", "format": "log"}, "config.data.path: not set; set it to the log file"),
        ({"path": "", "format": "amazon_reviews"}, "config.data.path: not set"),
        ({"k_core": 5}, "config.data.k_core: 5 leaves no interactions"),
        ({"split": "temporal"}, "config.data.split: temporal needs timestamps"),
        ({"split": "given"}, "config.data.split: this data has no split of its own"),
    ],
)
def test_mistakes_in_the_config_are_named(p5_folder, cache_dir, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(config_of(**{"path": str(p5_folder), **changes}), cache_dir)


def test_an_unwritable_cache_folder_is_named(p5_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't be written"):
        load(config_of(path=str(p5_folder)), tmp_path / "file")


@pytest.mark.parametrize(("order", "num_users", "warns"), [(sorted, 100, True), (list, 100, False), (sorted, 9, False)])
def test_sequences_sorted_by_id_cause_a_warning(tmp_path, cache_dir, caplog, order, num_users, warns):
    """Sorting by id loses the order in time. With few users, sequences may be sorted by chance."""
    generator = np.random.default_rng(0)
    users = [generator.choice(50, 6, replace=False).astype(str) for _ in range(num_users)]
    lines = [f"u{number} {' '.join(order(items))}" for number, items in enumerate(users)]
    (tmp_path / "user_sequence.txt").write_text("\n".join(lines))
    load(config_of(path=str(tmp_path), name="mine"), cache_dir)
    assert ("every user's items in mine are sorted by id" in caplog.text) == warns
