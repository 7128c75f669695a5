"""Files of histories, read in parts."""

import gzip
import json

import polars as pl
import pytest

from simgr_jax.errors import UserError
from simgr_jax.serving import history_files
from simgr_jax.serving.history_files import count_rows, read_parts

ROWS = [{"user": f"u{number}", "items": [f"i{item}" for item in range(number)]} for number in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_of(parts):
    histories = [history for part in parts for history in part.histories]
    return [{"user": user, "items": items} for user, items in histories]


@pytest.mark.parametrize("size", [1, 3, 10, 100])
@pytest.mark.parametrize("begin", [0, 4, 10])
def test_every_row_after_the_begin_is_read_once_in_order(tmp_path, begin, size):
    path = write(tmp_path / "a.jsonl", ROWS)
    parts = list(read_parts(path, begin, size))
    assert all_of(parts) == ROWS[begin:]
    assert all(len(part.histories) <= size for part in parts)
    assert [part.end for part in parts] == [min(end, 10) for end in range(begin + size, 10 + size, size)]
    assert count_rows(path) == 10


def test_parquet_and_compressed_files_hold_the_same(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "a.jsonl", ROWS).read_bytes()))
    for name in ("a.parquet", "a.jsonl.gz"):
        assert all_of(read_parts(tmp_path / name, 2, 3)) == ROWS[2:]
        assert count_rows(tmp_path / name) == 10


def test_ids_may_be_numbers_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"user": 7, "items": [1, 2.0]}\n\n  \n{"user": "b", "items": []}')
    (part,) = read_parts(path, 0, 10)
    assert part.histories == [("7", ["1", "2"]), ("b", [])] and not part.bad and part.end == count_rows(path) == 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line: not JSON in UTF-8"),
        ("[1]", "line: not an object"),
        ("9" * 5000, "line: not JSON in UTF-8"),
        ("[" * 100_000, "line: not JSON in UTF-8"),
        ('{"user": "a"}', "items: is missing"),
        ('{"items": []}', "user: is missing"),
        ('{"user": "a", "items": [], "itms": []}', "itms: is unknown"),
        ('{"user": "a", "items": "b"}', "items: is not a list"),
        ('{"user": "a", "items": [["b"]]}', "row: items ['b'] is not a string or a number"),
        ('{"user": "a", "items": [null]}', "items: has an empty id"),
        ('{"user": null, "items": []}', "user: has an empty id"),
        ('{"user": "a", "items": [0.5]}', "row: items 0.5 is a floating-point number"),
        ('{"user": "a", "items": ["\\ud800"]}', "row: items '\\ud800' is not a string"),
        ('{"user": "a", "items": [' + "1," * 10_000 + "1]}", "items: are 10,001; give the newest 10,000"),
        ("x" * 500, "line: is longer than 100 bytes"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, monkeypatch, line, reason):
    if "longer" in reason:
        monkeypatch.setattr(history_files, "_LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": "a", "items": []}\n' + line + '\n{"user": "b", "items": []}\n')
    (part,) = read_parts(path, 0, 10)
    assert [history.user for history in part.histories] == ["a", "b"]
    ((number, found),) = part.bad
    assert number == 2 and found.startswith(reason) and "; " in found and "\n" not in found


def test_bytes_that_are_not_utf8_are_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"user": "a\xff", "items": []}\n')
    ((_, bad, _),) = read_parts(path, 0, 10)
    assert bad[0].reason.startswith("line: not JSON in UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("a.parquet", b"PAR1", "a.parquet: can't be read"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00rubbish", "a.jsonl.gz: can't be read"),
        ("a.jsonl", '{"user": "a", "items": []}'.encode("utf-16"), "a.jsonl: is UTF-16 text"),
    ],
)
def test_a_file_that_can_not_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_parts(path, 0, 10))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user": ["a"], "item": ["b"]}, "has no column 'items', only user, item"),
        ({"user": ["a"], "items": ["b"]}, "column 'items' is (large_)?string(_view)?, not a list"),
    ],
)
def test_a_parquet_file_without_the_columns(tmp_path, frame, message):
    pl.DataFrame(frame).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        list(read_parts(tmp_path / "a.parquet", 0, 10))
