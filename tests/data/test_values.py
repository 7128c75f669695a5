"""Ids and times mean the same in every format; what can't be kept exactly is refused or said."""

import datetime
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simgr_jax.data.readers import log
from simgr_jax.errors import UserError

NEW_YEAR = 1_577_836_800
COLUMNS = {"user": "user", "item": "item", "timestamp": "time"}


def read(folder, **columns):
    """Reads a Parquet log with these columns in place of plain ones."""
    size = max(len(values) for values in columns.values())
    plain = {"user": ["u"] * size, "item": [f"i{i}" for i in range(size)], "time": list(range(size))}
    pl.DataFrame({**plain, **columns}).write_parquet(folder / "log.parquet")
    return log.read(folder / "log.parquet", "x", **COLUMNS)


def sequence(dataset):
    return [dataset.item_ids[i] for i in dataset.sequences.values]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pl.Series([1.0, 20.0], dtype=pl.Float64), ["1", "20"]),
        (pl.Series([1.0, 20.0], dtype=pl.Float32), ["1", "20"]),
        (pl.Series([2**53], dtype=pl.Int64), [str(2**53)]),
        (pl.Series([b"a", "é".encode()]), ["a", "é"]),
        (pl.Series(["b", "a"], dtype=pl.Categorical), ["b", "a"]),
        (pl.Series(["1", "20"]).cast(pl.Decimal(10, 2)), ["1", "20"]),
    ],
)
def test_ids_of_any_type_are_strings(tmp_path, ids, expected):
    assert sequence(read(tmp_path, item=ids)) == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pl.Series([1.0, None]), "log.parquet:row 2: no item"),
        (pl.Series([1.0, float("nan")]), "log.parquet:row 2: no item"),
        (pl.Series([1.0, 1.5]), "log.parquet:row 2: item 1.5 is a floating-point number"),
        (pl.Series([1.0, 2.0**54]), "log.parquet:row 2: item 1.8014398509481984e+16 is a floating-point number"),
        (pl.Series([2.0**25], dtype=pl.Float32), "log.parquet:row 1: item 33554432.0 is a floating-point number"),
        (pl.Series([1.0, float("inf")]), "log.parquet:row 2: item inf is a floating-point number"),
        (pl.Series(["a", ""]), "log.parquet:row 2: no item"),
        (pl.Series(["a", "  "]), "log.parquet:row 2: no item"),
        (pl.Series([b"a", b"\xff"]), "log.parquet: column 'item' holds bytes that are not UTF-8"),
    ],
)
def test_ids_that_can_not_be_told_are_refused(tmp_path, ids, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, item=ids)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_ids_that_are_strings_are_kept_as_they_are_spelled(tmp_path, suffix):
    path, frame = tmp_path / f"log{suffix}", pl.DataFrame({"user": "u", "item": ["007", "7.0", "7"], "time": "5"})
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    assert log.read(path, "x", **COLUMNS).item_ids == ["007", "7", "7.0"]


def test_ids_that_differ_by_blanks_alone_are_said(tmp_path):
    dataset = read(tmp_path, item=["a", "a ", "b"])
    assert sequence(dataset) == ["a", "a ", "b"]
    (note,) = dataset.notes
    assert "log.parquet has ids that differ by blanks alone" in note and "'a' and 'a '" in note
    assert not read(tmp_path, item=["a", "b c", " d"]).notes


@pytest.mark.parametrize(("item", "near"), [("7", "007"), ("007", "7"), ("7", "7.0"), ("b7", "B7"), ("a", "a ")])
def test_an_item_that_is_spelled_otherwise_is_named(tmp_path, item, near):
    (tmp_path / "log.csv").write_text(f"user,item,time\nu,{item},1\n")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": i, "title": ""}) + "\n" for i in ("x", near)))
    items = {"items_file": str(tmp_path / "items.jsonl"), "items_id": "id", "items_text": ("title",)}
    with pytest.raises(UserError, match=f"no row for item {item} of .*, but for '{near}'; spell ids alike"):
        log.read(tmp_path / "log.csv", "x", **COLUMNS, **items)


def test_floats_in_an_items_file_are_the_integers_of_the_log(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\nu,7,1\n")
    pl.DataFrame({"id": [7.0, 8.0], "title": ["seven", "eight"]}).write_parquet(tmp_path / "items.parquet")
    (tmp_path / "items.jsonl").write_text('{"id": 7.0, "title": "seven"}\n')
    for name in ("items.parquet", "items.jsonl"):
        items = {"items_file": str(tmp_path / name), "items_id": "id", "items_text": ("title",)}
        assert log.read(tmp_path / "log.csv", "x", **COLUMNS, **items).item_texts == ["seven"]


def test_damaged_parquet_files_are_one_line(tmp_path):
    """Flips, cuts and inserts bytes: the file is read, or refused with one line, and never a panic."""
    read(tmp_path, item=["a", "b", "c"] * 20)
    path, rng = tmp_path / "log.parquet", np.random.default_rng(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(1_000):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            place, size = rng.integers(len(data)), rng.integers(3)
            data[place : place + size] = rng.bytes(rng.integers(1, 3))
        path.write_bytes(data)
        try:
            log.read(path, "x", **COLUMNS)
        except UserError as error:
            refused += 1
            assert "log.parquet" in str(error)
    assert refused > 300


@pytest.mark.parametrize(
    ("kind", "times", "said"),
    [
        (pl.Float32, [1_700_000_203, 1_700_000_202, 1_700_000_201], True),
        (pl.Float32, [16_777_215, 5, 7], False),
        (pl.Float16, [2049, 2051, 7], True),
        (pl.Float64, [2**53 + 2, 5, 7], True),
        (pl.Float64, [1_700_000_203.25, 5, 7], False),
        (pl.Int64, [2**62, 5, 7], False),
    ],
)
def test_times_that_their_type_has_rounded_are_said(tmp_path, kind, times, said):
    notes = read(tmp_path, time=pl.Series(times, dtype=kind, strict=False)).notes
    assert ["log.parquet holds floating-point numbers of" in note for note in notes] == [True] * said


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (pl.Series([1_700_000_000_000_000_100, 1_700_000_000_000_000_000]).cast(pl.Datetime("ns")), True),
        (pl.Series([1_700_000_000_000_001, 1_700_000_000_000_000]).cast(pl.Datetime("us")), False),
        (pl.Series(["2020-01-01T00:00:00.000000001", "2020-01-01T00:00:00.000000002"]), True),
        (pl.Series(["2020-01-01T00:00:00.50", "2020-01-01T02:00:00.5+02:00", "2020-01-01"]), False),
        (pl.Series([0.5, 0.25], dtype=pl.Float32), True),
        (pl.Series(["1700000000.000000001", "1700000000.000000002"]).cast(pl.Decimal(38, 9)), True),
        (pl.Series(["1700000000.5", "1700000000.25"]).cast(pl.Decimal(38, 9)), False),
        (pl.Series(["9007199254740993.0", "9007199254740992.0"]), True),
        (pl.Series(["1700000000.0000000001", "1700000000.0000000002"]), True),
        (pl.Series(["7.50", "7.5", "7.", "7", "+7.0", "-7.0"]), False),
    ],
)
def test_times_that_the_conversion_makes_equal_are_said(tmp_path, times, said):
    notes = read(tmp_path, time=times).notes
    assert ["so interactions may have lost their order" in note for note in notes] == [True] * said


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([5, 2**31 - 1], pa.int32()).cast(pa.date32()), "log.parquet:row 2: time is a date beyond the years"),
        (pa.array([5, 2**62], pa.timestamp("ms")), "log.parquet:row 2: time is a date beyond the years 0 to 9999"),
        (pa.array([5, -(2**62)], pa.timestamp("us", "UTC")), "log.parquet:row 2: time is a date beyond the years"),
        (pa.array([5, 6]).cast(pa.decimal256(50, 1)), "log.parquet: column 'time' is of type decimal256(50, 1)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"timestamp": "other", "where": "time != 'x'"}])
def test_what_polars_panics_on_is_refused(tmp_path, capfd, column, message, options):
    table = {"user": ["u", "u"], "item": ["a", "b"], "time": column, "other": [1, 2]}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    with pytest.raises(UserError) as caught:
        log.read(tmp_path / "log.parquet", "x", **{**COLUMNS, **options})
    assert message in str(caught.value)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("zone", [None, "+05:30", "-08:00", "UTC", "Europe/Berlin"])
def test_times_with_a_zone_are_utc(tmp_path, zone):
    times = pa.array([NEW_YEAR * 1_000_000], pa.timestamp("us", zone))
    pq.write_table(pa.table({"user": ["u"], "item": ["a"], "time": times}), tmp_path / "log.parquet")
    assert log.read(tmp_path / "log.parquet", "x", **COLUMNS).timestamps.tolist() == [NEW_YEAR]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pl.Series([b"a", b"\xff"]), "log.parquet: column 'event' holds bytes that are not UTF-8"),
        (pl.Series([["a"], ["b"]]), "log.parquet: column 'event' holds lists or records"),
    ],
)
def test_a_condition_on_a_column_without_plain_values_is_refused(tmp_path, values, message):
    frame = pl.DataFrame({"user": "u", "item": ["a", "b"], "time": [1, 2], "event": values})
    frame.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(UserError) as caught:
        log.read(tmp_path / "log.parquet", "x", **COLUMNS, where="event = 'a'")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pl.Series([1, 2**63], dtype=pl.UInt64), "log.parquet:row 2: time 9.22337e+18 is beyond 64-bit integers"),
        (pl.Series(["1", "-99999999999999999999"]), "log.parquet:row 2: time -1e+20 is beyond 64-bit integers"),
        (pl.Series([1.0, 1e300]), "log.parquet:row 2: time 1e+300 is beyond 64-bit integers"),
        (pl.Series([1.0, float("inf")]), "log.parquet:row 2: time inf is not a number"),
        (pl.Series([1.0, None]), "log.parquet:row 2: no time"),
        (pl.Series([True, False]), "log.parquet: column 'time' is of type Boolean"),
        (pl.Series([datetime.timedelta(1)]), "log.parquet: column 'time' is of type Duration"),
        (pl.Series(["2020-01-01", "2020-02-30", "2020-01-03"]), "row 2: time '2020-02-30' is not an ISO date"),
        (pl.Series(["2020-01-01", "01/02/2020", "2020-01-03"]), "row 2: time '01/02/2020' is not an ISO date"),
        (pl.Series(["2020-01-01", "2020-01-02 25:00", "2020-01-03"]), "row 2: time '2020-01-02 25:00' is not an ISO"),
        (pl.Series(["2020-01-01", "2020-01-02T00:00+25:00"]), "row 2: time '2020-01-02T00:00+25:00' is not an ISO"),
        (pl.Series(["2020-01-01", "2020-01-02T00:00+02:99"]), "row 2: time '2020-01-02T00:00+02:99' is not an ISO"),
        (pl.Series(["5", "2020-01-01", "7"]), "row 2: time '2020-01-01' is not a number"),
    ],
)
def test_times_that_can_not_be_told_are_refused(tmp_path, times, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, time=times)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-01", 0),
        ("2020-01-01T00:01", 60),
        ("2020-01-01 00:00:07", 7),
        ("2020-01-01T00:00:07Z", 7),
        ("2020-01-01 00:00:07 UTC", 7),
        ("2020-01-01T02:00:07+02:00", 7),
        ("2019-12-31T18:30:00-0530", 0),
        ("2020-01-01 01:00:00+01", 0),
        ("1969-12-31T23:59:59", -NEW_YEAR - 1),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_iso_dates_are_seconds(tmp_path, suffix, text, seconds):
    path, frame = tmp_path / f"log{suffix}", pl.DataFrame({"user": ["u"], "item": ["a"], "time": [text]})
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[suffix](path)
    assert log.read(path, "x", **COLUMNS).timestamps.tolist() == [NEW_YEAR + seconds]


def test_fractions_of_iso_seconds_keep_the_order(tmp_path):
    times = ["2020-01-01T00:00:07.000002Z", "2020-01-01T00:00:07.000001Z", "2020-01-01T00:00:07"]
    assert sequence(read(tmp_path, item=["c", "b", "a"], time=times)) == ["a", "b", "c"]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_moments_keep_their_order(tmp_path, unit):
    times = pl.Series([NEW_YEAR * 1000 + 2, NEW_YEAR * 1000 + 1]).cast(pl.Datetime("ms")).cast(pl.Datetime(unit))
    dataset = read(tmp_path, item=["b", "a"], time=times)
    assert sequence(dataset) == ["a", "b"]
    np.testing.assert_allclose(dataset.timestamps, [NEW_YEAR + 0.001, NEW_YEAR + 0.002], rtol=0, atol=1e-6)
