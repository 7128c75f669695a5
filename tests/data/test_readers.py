"""Each format's reader, on small files and, if they are there, on the real files beside the repository."""

import ast
import csv
import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from simgr_jax.data import splits
from simgr_jax.data.readers import lcrec_files, log, minionerec, p5, recbole

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")

COLUMNS = {"user": "user", "item": "item", "timestamp": "time"}


def lists_of(dataset):
    """{user: [items]} by id."""
    return {
        user: [dataset.item_ids[i] for i in sequence]
        for user, sequence in zip(dataset.user_ids, dataset.sequences, strict=True)
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_p5_items_keep_the_order_of_their_file(tmp_path):
    write(tmp_path / "user_sequence.txt", "u1 b a b\nu2\ta  c\n\n")
    write(tmp_path / "item_plain_text.txt", "c sea salt, 2 oz\na \nb apple; pie\nd never bought")
    dataset = p5.read(tmp_path, "x")
    assert dataset.item_ids == ["c", "a", "b", "d"]
    assert dataset.item_texts == ["sea salt, 2 oz", "", "apple; pie", "never bought"]
    assert lists_of(dataset) == {"u1": ["b", "a", "b"], "u2": ["a", "c"]}
    assert dataset.timestamps is None


def test_a_missing_text_in_a_p5_file_is_no_word(tmp_path):
    write(tmp_path / "user_sequence.txt", "u1 a b c\n")
    write(tmp_path / "item_plain_text.txt", "a NaN\nb None\nc None of the above\n")
    assert p5.read(tmp_path, "x").item_texts == ["", "", "None of the above"]


def test_p5_items_without_a_file_come_in_order_of_first_appearance(tmp_path):
    write(tmp_path / "user_sequence.txt", "u1 b a b\nu2 a c\n")
    dataset = p5.read(tmp_path, "x")
    assert dataset.item_ids == ["b", "a", "c"]
    assert dataset.item_texts is None


@needs_real_data
@pytest.mark.parametrize(
    ("folder", "users", "items", "interactions", "first_user", "first_items"),
    [
        ("amazon_beauty", 22_363, 12_101, 198_502, "A1YJEY40YUW4SE", ["B004756YJA", "B004ZT0SSG", "B0020YLEYK"]),
        ("amazon_toys", 19_412, 11_924, 167_597, None, None),
    ],
)
def test_real_p5_files_are_read(folder, users, items, interactions, first_user, first_items):
    dataset = p5.read(SHARED / folder, "x")
    assert (len(dataset.user_ids), dataset.num_items) == (users, items)
    assert dataset.sequences.values.size == interactions
    assert all(dataset.item_texts)
    if first_user:
        assert lists_of(dataset)[first_user][:3] == first_items


def test_lcrec_items_are_sorted_by_number(tmp_path):
    write(tmp_path / "X.inter.json", {"7": [10, 2, 10], "8": ["0", "2"]})
    write(tmp_path / "X.index.json", {"10": ["<a_1>"], "2": ["<a_2>"], "0": ["<a_0>"], "3": ["<a_3>"]})
    write(
        tmp_path / "X.item.json",
        {
            "10": {"title": "Ten &amp; more", "description": "['Big.', 'Red.']", "brand": "B", "categories": "C"},
            "2": {"title": "Two", "description": "<p>plain</p>"},
            "0": {"title": "", "description": []},
        },
    )
    dataset = lcrec_files.read(tmp_path, "x")
    assert dataset.item_ids == ["0", "2", "10"]  # by number; item 3 is not in the catalog
    assert dataset.item_texts == ["", "Two. plain", "Ten & more. B. C. Big. Red"]
    assert lists_of(dataset) == {"7": ["10", "2", "10"], "8": ["0", "2"]}
    assert dataset.codes.tolist() == [[0], [2], [1]]
    assert dataset.codebook_sizes == (4,)


def test_lcrec_files_may_be_the_sequences_alone(tmp_path):
    write(tmp_path / "X.inter.json", {"u": ["b", "a"], "v": ["c"]})
    dataset = lcrec_files.read(tmp_path, "x")
    assert dataset.item_ids == ["b", "a", "c"]
    assert dataset.item_texts is None and dataset.codes is None


def test_an_id_of_more_digits_than_python_converts_is_no_number(tmp_path):
    items = ["9" * 5_000, "10", "9"]
    (tmp_path / "x.inter.json").write_text(json.dumps({"u": items}))
    assert lcrec_files.read(tmp_path, "x").item_ids == items


@needs_real_data
def test_real_lcrec_files_are_read():
    dataset = lcrec_files.read(SHARED / "amazon_instruments", "x")
    assert (len(dataset.user_ids), dataset.num_items) == (24_772, 9_922)
    assert dataset.sequences.values.size == 206_153
    assert dataset.item_ids == [str(i) for i in range(9_922)]
    assert dataset.codes.shape == (9_922, 4)
    assert dataset.codes[0].tolist() == [137, 112, 79, 200]
    assert len(np.unique(dataset.codes, axis=0)) == 9_922 - 25
    assert dataset.codebook_sizes == (256, 256, 256, 256)


def minionerec_csv(*rows):
    lines = ["user_id,history_item_title,history_item_id,item_id"]
    for user, history, item in rows:
        lines.append(f'{user},"[\'two\nlines, quoted\']","{history}",{item}')
    return "\n".join(lines) + "\n"


def test_minionerec_rows_join_into_sequences(tmp_path):
    long = list(range(12))
    write(
        tmp_path / "train/X.csv",
        minionerec_csv(
            ("u", [0], 1), ("v", [5], 6), ("u", [0, 1], 2), *(("w", long[max(t - 10, 0) : t], t) for t in long[1:])
        ),
    )
    write(tmp_path / "valid/X.csv", minionerec_csv(("v", [5, 6], 5), ("n", [3, 4], 3), ("w", long[2:], 3)))
    write(tmp_path / "test/X.csv", minionerec_csv(("u", [0, 1, 2], 3), ("n", [3, 4, 3], 9), ("v", [5, 6, 5], 1)))
    dataset = minionerec.read(tmp_path, "x")
    assert [note.partition(": ")[2][:32] for note in dataset.notes] == [
        "14 of 14 rows take several lines",
        "3 of 3 rows take several lines (",
        "3 of 3 rows take several lines (",
    ]
    assert dataset.item_ids == [str(i) for i in range(12)]
    assert lists_of(dataset) == {
        "u": ["0", "1", "2", "3"],
        "v": ["5", "6", "5", "1"],
        "w": [*(str(i) for i in long), "3"],
        "n": ["3", "4", "3", "9"],
    }
    assert dataset.parts.tolist() == [0, 0, 0, 2, 0, 0, 1, 2, *[0] * 12, 1, 0, 0, 1, 2]
    split = splits.given(dataset)
    assert [len(split.train), len(split.validation), len(split.test)] == [4, 3, 3]


@pytest.fixture(scope="module")
def industrial(tmp_path_factory):
    """The real valid and test rows, and train rows made from their first histories."""
    source, folder = SHARED / "amazon_industrial", tmp_path_factory.mktemp("industrial")
    shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    histories = {}
    for part in ("valid", "test"):
        with next((source / part).glob("*.csv")).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                histories.setdefault(row["user_id"], ast.literal_eval(row["history_item_id"]))
    rows = [(user, items[:t], items[t]) for user, items in histories.items() for t in range(1, len(items))]
    write(folder / "train/X.csv", minionerec_csv(*rows))
    return folder, len(rows)


@needs_real_data
def test_real_minionerec_files_are_read(industrial):
    folder, num_train_rows = industrial
    dataset = minionerec.read(folder, "x")
    assert dataset.num_items == 3_686
    assert dataset.codes.shape == (3_686, 3)
    # Each row is an interaction, and each user's first interaction has no row.
    labels = np.bincount(dataset.parts)
    assert labels.tolist() == [num_train_rows + len(dataset.user_ids), 4_532, 4_533]
    split = splits.given(dataset)
    assert (len(split.validation), len(split.test)) == (4_532, 4_533)
    assert lists_of(dataset)["A474"][:4] == ["168", "278", "719", "1526"]


@needs_real_data
def test_real_item_texts_are_clean(industrial):
    texts = minionerec.read(industrial[0], "x").item_texts
    assert all(texts)
    assert not [text for text in texts if any(mess in text for mess in ("&ndash;", "&#39;", "<br", "\n", "[]"))]
    assert texts[11].startswith('TÜRLEN DIAL INDICATOR 0-1" AGD SPEC 0.001" w/LUG BACK')
    assert texts[0].startswith(
        "SUPCO SPP6 Relay/Capacitor Hard Start Kit with 500% Increase Starting Torque. Sealed Unit"
    )
    assert "['" not in texts[51]  # its description is a list with a lost quote


def test_recbole_files_are_read(tmp_path):
    write(
        tmp_path / "x.inter",
        "rating:float\tuser_id:token\titem_id:token\ttimestamp:float\n"
        '5\tu"1\tb\t9.5e2\n1\tv\ta\t3\n2\tu"1\ta\t949.0\n2\tu"1\ta\t949.0\n',
    )
    write(
        tmp_path / "x.item",
        "item_id:token\ttitle:token_seq\tprice:float\tgenre:token\n\nb\tMen in &quot;Black&quot;\t1.5\tcomedy\n\n",
    )
    dataset = recbole.read(tmp_path, "x")
    assert lists_of(dataset) == {'u"1': ["a", "b"], "v": ["a"]}
    assert dataset.timestamps.tolist() == [949, 950, 3]
    assert dataset.item_texts == ["", 'Men in "Black". comedy']


ROWS = {"user": ["v", "u", "u", "u"], "item": ["1", "10", "2", "1"], "time": [5, 7, 7, 6]}
EXPECTED = {"u": ["1", "10", "2"], "v": ["1"]}  # Items 2 and 10 are at the same time, so a hash orders them.


def test_a_recbole_item_file_may_have_no_text(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n")
    (tmp_path / "x.item").write_text("item_id:token\tprice:float\na\t2.5\n")
    assert recbole.read(tmp_path, "x").item_texts == [""]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_log_is_sorted_by_user_and_time(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    frame = pl.DataFrame({"other": [1.5] * 4, **ROWS})
    if suffix == ".parquet":
        frame.with_columns(pl.col("item").cast(pl.Int64)).write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",", include_bom=True)
    dataset = log.read(path, "x", **COLUMNS)
    assert lists_of(dataset) == EXPECTED
    assert dataset.timestamps.tolist() == [6, 7, 7, 5]
    assert dataset.item_texts is None


@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_dates_become_seconds(tmp_path, zone):
    times = [datetime.datetime(2020, 1, 1, 0, 0, s, tzinfo=datetime.UTC) for s in ROWS["time"]]
    frame = pl.DataFrame({**ROWS, "time": times}).with_columns(
        pl.col("time").dt.convert_time_zone(zone) if zone else pl.col("time").dt.replace_time_zone(None)
    )
    frame.write_parquet(tmp_path / "log.parquet")
    dataset = log.read(tmp_path / "log.parquet", "x", **COLUMNS)
    assert lists_of(dataset) == EXPECTED
    assert dataset.timestamps.tolist() == [1_577_836_806, 1_577_836_807, 1_577_836_807, 1_577_836_805]


def test_timestamps_too_large_for_a_float_stay_exact_and_blank_lines_are_skipped(tmp_path):
    write(tmp_path / "log.csv", "user,item,time\nu,a,1700000000000000001\n\nu,b,1700000000000000000\n\n")
    dataset = log.read(tmp_path / "log.csv", "x", **COLUMNS)
    assert lists_of(dataset) == {"u": ["b", "a"]}
    assert dataset.timestamps.tolist() == [1_700_000_000_000_000_000, 1_700_000_000_000_000_001]


ITEMS = [
    {"id": "1", "title": "one", "tags": "x &amp; y"},
    {"id": "10", "title": "ten", "tags": None},
    {"id": "2", "title": "two", "tags": "z"},
    {"id": "3", "title": "never bought", "tags": "z"},
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_log_takes_texts_from_the_items_file(tmp_path, suffix):
    write(tmp_path / "log.csv", pl.DataFrame(ROWS).write_csv())
    path, frame = tmp_path / f"items{suffix}", pl.DataFrame(ITEMS)
    {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}[suffix](path)
    items = {"items_file": str(path), "items_id": "id", "items_text": ("title", "tags")}
    dataset = log.read(tmp_path / "log.csv", "x", **COLUMNS, **items)
    assert dataset.item_ids == ["1", "10", "2"]
    assert dataset.item_texts == ["one. x & y", "ten", "two. z"]


def test_items_without_interactions_stay_in_the_catalog_if_that_is_asked_for(tmp_path):
    write(tmp_path / "log.csv", pl.DataFrame(ROWS).write_csv())
    path = tmp_path / "items.csv"
    pl.DataFrame(ITEMS).write_csv(path)
    items = {"items_file": str(path), "items_id": "id", "items_text": ("title",), "keep_cold_items": True}
    dataset = log.read(tmp_path / "log.csv", "x", **COLUMNS, **items)
    assert dataset.item_ids == ["1", "10", "2", "3"]
    assert dataset.item_texts == ["one", "ten", "two", "never bought"]


def test_a_log_counts_the_rows_that_the_condition_names(tmp_path):
    write(
        tmp_path / "log.csv",
        "user,item,time,event,rating\nu,a,1,view,5\nu,b,2,purchase,5\n\nu,c,3,purchase,3.5\nv,b,1,,4\nv,d,2,purchase,\n",
    )
    dataset = log.read(tmp_path / "log.csv", "x", **COLUMNS, where='event = "purchase" and rating >= 3.5')
    assert lists_of(dataset) == {"u": ["b", "c"]}
    assert dataset.item_ids == ["b", "c"]
    assert dataset.notes == ("config.data.log.where leaves out 3 of 5 rows",)
