"""A log is read as people have it: any usual separator, header, compression and format gives the same dataset."""

import datetime
import json

import polars as pl
import pyarrow as pa
import pytest

from simgr_jax.data.readers import log, recbole
from simgr_jax.errors import UserError

COLUMNS = {"user": "user", "item": "item", "timestamp": "time"}
ROWS = [("u", "b", 7), ("u", "a", 6), ("v", "a", 5)]
EXPECTED = {"u": ["a", "b"], "v": ["a"]}


def lists_of(dataset):
    return {
        user: [dataset.item_ids[i] for i in sequence]
        for user, sequence in zip(dataset.user_ids, dataset.sequences, strict=True)
    }


def text(separator, header=("user", "title", "item", "time"), end="\n"):
    return "".join(separator.join(map(str, row)) + end for row in [header, *((u, "x", i, t) for u, i, t in ROWS)])


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", ", "; "])
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.CSV", "log.csv.gz", "log.tsv.zst"])
@pytest.mark.parametrize("quoted", [False, True])
def test_the_separator_goes_by_the_header(tmp_path, separator, name, quoted):
    content = text(separator)
    if quoted and separator != "\t":
        content = content.replace("x", f'"1{separator}2"')
    with pa.output_stream(str(tmp_path / name), compression="detect") as file:
        file.write(content.encode())
    assert lists_of(log.read(tmp_path / name, "x", **COLUMNS)) == EXPECTED


@pytest.mark.parametrize("title", ["x", '"x"'])
@pytest.mark.parametrize("rows", [" u,b,7,{}\n u,a,6,{}\nv,a,5,{}\n", "u,  b, 7,{}\nu,a,6,{}\nv,a,5,{}\n"])
def test_blanks_before_the_fields_of_a_csv_file_are_none(tmp_path, rows, title):
    (tmp_path / "log.csv").write_text("user,item,time,title\n" + rows.format(title, "x", "x"))
    assert lists_of(log.read(tmp_path / "log.csv", "x", **COLUMNS)) == EXPECTED


def test_a_named_separator_is_taken(tmp_path):
    (tmp_path / "log.csv").write_text(text("^"))
    assert lists_of(log.read(tmp_path / "log.csv", "x", **COLUMNS, separator="^")) == EXPECTED
    (tmp_path / "log.csv").write_text(text("\t"))
    assert lists_of(log.read(tmp_path / "log.csv", "x", **COLUMNS, separator="\\t")) == EXPECTED


@pytest.mark.parametrize(
    ("name", "separator", "message"),
    [
        ("log.csv", "ab", "config.data.log.separator: 'ab' can't separate fields"),
        ("log.csv", '"', "config.data.log.separator: '\"' can't separate fields"),
        ("log.csv", "é", "config.data.log.separator: 'é' can't separate fields"),
        ("log.csv", ";", "log.csv:1: no column 'user' (it has user,item,time)"),
        ("log.jsonl.gz", ",", "config.data.log.separator: is not read for log.jsonl.gz"),
        ("log.parquet", ",", "config.data.log.separator: is not read for log.parquet"),
    ],
)
def test_a_separator_that_can_not_be_is_refused(tmp_path, name, separator, message):
    (tmp_path / name).write_text("user,item,time\nu,a,1\n")
    with pytest.raises(UserError) as caught:
        log.read(tmp_path / name, "x", **COLUMNS, separator=separator)
    assert message in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [("User", "title", " ITEM", "Time "), ("user", "User", "item", "time")])
def test_a_header_may_differ_by_case_and_blanks(tmp_path, header, end):
    (tmp_path / "log.csv").write_bytes(("\ufeff" + text(",", header, end)).encode())
    assert lists_of(log.read(tmp_path / "log.csv", "x", **COLUMNS)) == EXPECTED
    frame = pl.read_csv((tmp_path / "log.csv").read_bytes())
    frame.write_parquet(tmp_path / "log.parquet")
    frame.write_ndjson(tmp_path / "log.jsonl")
    for name in ("log.parquet", "log.jsonl"):
        assert lists_of(log.read(tmp_path / name, "x", **COLUMNS)) == EXPECTED


@pytest.mark.parametrize("header", ["user,item,item,time", "USER,User,item,time"])
def test_two_columns_of_one_name_are_refused(tmp_path, header):
    (tmp_path / "log.csv").write_text(f"{header}\nu,a,b,1\n")
    with pytest.raises(UserError, match=r"log.csv:1: 2 columns are called '(item|user)'; rename the others"):
        log.read(tmp_path / "log.csv", "x", **COLUMNS)


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz", "log.jsonl.zst"])
def test_a_log_of_json_lines(tmp_path, name):
    rows = [*ROWS, ("v", 10, "8"), ("v", 11.0, 9.0)]
    lines = [json.dumps({"x": [1], "user": u, "item": i, "time": t}) + "\n\n" for u, i, t in rows]
    with pa.output_stream(str(tmp_path / name), compression="detect") as file:
        file.write("".join(lines).encode())
    assert lists_of(log.read(tmp_path / name, "x", **COLUMNS)) == {"u": ["a", "b"], "v": ["a", "10", "11"]}


ROW = '{"user": "u", "item": "a", "time": 1}\n'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"user": "u", "time": 1}\n', "log.jsonl:1: no column 'item' (it has user, time); set config.data.log.user"),
        (ROW + "\n" + '{"user": "u", "time": 1}\n', "log.jsonl:3: no item"),
        (ROW + '{"user": "u", "item": "", "time": 1}\n', "log.jsonl:2: no item"),
        (ROW + '{"user": "u", "item": [1], "time": 1}\n', "log.jsonl:2: item [1] is not a string or a number"),
        (ROW + '{"user": "u", "item": true, "time": 1}\n', "log.jsonl:2: item True is not a string or a number"),
        (ROW + '{"user": "u", "item": 0.5, "time": 1}\n', "log.jsonl:2: item 0.5 is a floating-point number; write"),
        (ROW + '{"user": 1e400, "item": "a", "time": 1}\n', "log.jsonl:2: user inf is a floating-point number"),
        (
            ROW + '{"user": "u", "item": 9007199254740993.0, "time": 1}\n',
            "log.jsonl:2: item 9007199254740992.0 is a floating-point number; write ids as integers or as strings",
        ),
        (ROW + '{"user": "u", "item": "a", "time": 1e400}\n', "log.jsonl:2: time 'inf' is not a number"),
        (ROW + '{"user": "u", "item": "a", "time": NaN}\n', "log.jsonl:2: no time"),
        (ROW + '{"user": "u", "item": "a", "time": 1' + "0" * 5_000 + "}\n", "log.jsonl:2: not JSON"),
        (ROW + '{"user": "u", "item": "a", "time"\n', "log.jsonl:2: not JSON"),
        (ROW + "[1]\n", "log.jsonl:2: not an object"),
        ("\n\n", "log.jsonl: has no interactions"),
    ],
)
def test_mistakes_in_json_lines_are_named(tmp_path, lines, message):
    (tmp_path / "log.jsonl").write_text(lines)
    with pytest.raises(UserError) as caught:
        log.read(tmp_path / "log.jsonl", "x", **COLUMNS)
    assert message in str(caught.value)


def test_float_ids_of_items_in_json_lines_are_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text(ROW)
    (tmp_path / "items.jsonl").write_text('{"id": 0.5, "title": "x"}\n')
    items = {"items_file": str(tmp_path / "items.jsonl"), "items_id": "id", "items_text": ("title",)}
    with pytest.raises(UserError, match=r"items.jsonl:1: id 0.5 is a floating-point number"):
        log.read(tmp_path / "log.jsonl", "x", **COLUMNS, **items)


@pytest.mark.parametrize(
    ("times", "said"), [(("1e16", "5"), True), (("9007199254740993.0", "5"), True), ((7.0, 5), False)]
)
def test_float_times_in_json_lines_that_are_rounded_are_said(tmp_path, times, said):
    rows = [f'{{"user": "u", "item": "a", "time": {time}}}\n' for time in times]
    (tmp_path / "log.jsonl").write_text("".join(rows))
    notes = log.read(tmp_path / "log.jsonl", "x", **COLUMNS).notes
    assert ["so interactions may have lost their order" in note for note in notes] == [True] * said


@pytest.mark.parametrize(
    ("values", "where", "items"),
    [
        ([None, '"b"', '"v"'], 'event = "b"', ["1"]),
        ([None, "null", "7"], "event != 7", ["0", "1"]),
        ([None, "true", "false"], "event = 1", ["1"]),
        ([None, "true", "false"], 'EVENT = "false"', ["2"]),
        (["true", '"x"', "false"], 'event = "true"', ["0"]),
        (["4.5", "4", "9007199254740993"], "event > 4", ["0", "2"]),
    ],
)
def test_a_condition_reads_keys_that_some_objects_lack(tmp_path, values, where, items):
    keys = ["" if value is None else f', "event": {value}' for value in values]
    rows = [f'{{"user": "u", "item": "{i}", "time": {i}{key}}}\n' for i, key in enumerate(keys)]
    (tmp_path / "log.jsonl").write_text("".join(rows))
    assert lists_of(log.read(tmp_path / "log.jsonl", "x", **COLUMNS, where=where)) == {"u": items}


def test_a_condition_on_a_key_that_no_object_has_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text(ROW)
    with pytest.raises(UserError, match=r"log.jsonl: no line has the key 'event'; correct the name"):
        log.read(tmp_path / "log.jsonl", "x", **COLUMNS, where="event = 'a'")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", text(",").encode("utf-16"), "log.csv: is UTF-16 text; convert the file, e.g. with iconv -f UTF-16"),
        ("log.tsv", text("\t").encode("utf-16-be"), "log.tsv:1: has NUL characters; convert the file to UTF-8"),
        ("log.jsonl", ROW.encode("utf-16"), "log.jsonl: is UTF-16 text; convert the file"),
        ("log.csv", text(",", end="\r").encode(), "log.csv:1: ends lines in carriage returns alone"),
        ("log.csv.gz", text(",").encode(), "log.csv.gz: can't be read ("),
        ("log.csv.zst", text(",").encode(), "log.csv.zst: can't be read ("),
        ("log.csv", b"user,item,time\nu,a,1\n\xff,a,2\n", "log.csv:3: not UTF-8 text"),
        ("log.csv", b'user,item,time\nu,"a",1\n\xff,a,2\n', "log.csv:3: not UTF-8 text"),
        ("log.csv", b"us\xffer,item,time\nu,a,1\n", "log.csv:1: not UTF-8 text"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        log.read(tmp_path / name, "x", **COLUMNS)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv.zst", "log.jsonl.gz"])
def test_a_compressed_file_that_was_cut_is_named(tmp_path, name):
    with pa.output_stream(str(tmp_path / name), compression="detect") as file:
        rows = [f"u{i * 7919 % 10_007},i{i * 104_729 % 9_973},{i}\n" for i in range(5_000)]
        file.write(("user,item,time\n" + "".join(rows)).encode() if "csv" in name else ROW.encode() * 5_000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}: can't be read"):
        log.read(tmp_path / name, "x", **COLUMNS)


def test_a_folder_of_parquet_parts(tmp_path):
    folder = tmp_path / "events"
    frame = pl.DataFrame(ROWS, schema=["user", "item", "time"], orient="row")
    (folder / "day=1").mkdir(parents=True)
    frame[:1].write_parquet(folder / "part-0.parquet")
    frame[1:].with_columns(pl.col("time").cast(pl.Float64)).write_parquet(folder / "day=1" / "part-1.parquet")
    frame[:0].write_parquet(folder / "part-2.parquet")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "part-3.parquet").write_text("half")
    (folder / "_SUCCESS").touch()
    assert lists_of(log.read(folder, "x", **COLUMNS)) == EXPECTED
    assert [path.name for path in log.files(folder)] == ["part-1.parquet", "part-0.parquet", "part-2.parquet"]

    frame.with_columns(item=pl.lit(None, pl.String)).write_parquet(folder / "part-2.parquet")
    with pytest.raises(UserError, match=r"part-2.parquet:row 1: no item"):
        log.read(folder, "x", **COLUMNS)


def write_parts(folder, *times):
    for i, values in enumerate(times):
        pl.DataFrame({"user": "u", "item": [f"{i}-{j}" for j in range(len(values))], "time": values}).write_parquet(
            folder / f"{i}.parquet"
        )


@pytest.mark.parametrize("dates", [["2020-01-01"], [datetime.datetime(2020, 1, 1)], [datetime.date(2020, 1, 1)]])
@pytest.mark.parametrize("numbers", [[1_600_000_000_000], [1.5], ["1600000000"]])
def test_a_folder_with_numbers_and_dates_is_refused(tmp_path, dates, numbers):
    write_parts(tmp_path, dates, [], numbers)
    with pytest.raises(UserError, match=r"0.parquet: column 'time' holds dates, but that of .*2.parquet holds numbers"):
        log.read(tmp_path, "x", **COLUMNS)
    write_parts(tmp_path, dates, dates, ["2020-01-02T00:00Z"])
    assert log.read(tmp_path, "x", **COLUMNS).timestamps.max() == 1_577_923_200


def test_integers_that_another_part_makes_floats_are_said(tmp_path):
    write_parts(tmp_path, [1_600_000_000_000_000_001, 1_600_000_000_000_000_000], [1.5])
    (note,) = log.read(tmp_path, "x", **COLUMNS).notes
    assert "0.parquet holds integers above 9,007,199,254,740,992, which are rounded because" in note
    write_parts(tmp_path, [1_600_000_000_001, 1_600_000_000_000], [1.5])
    assert not log.read(tmp_path, "x", **COLUMNS).notes


def test_every_file_of_a_folder_is_a_part_or_refused(tmp_path):
    frame = pl.DataFrame(ROWS, schema=["user", "item", "time"], orient="row")
    for i, name in enumerate(["a.parq", "B.PARQUET", "c.parquet"]):
        frame[i : i + 1].write_parquet(tmp_path / name)
    (tmp_path / ".c.parquet.crc").touch()
    assert lists_of(log.read(tmp_path, "x", **COLUMNS)) == EXPECTED
    frame[:2].write_parquet(tmp_path / "log.parq")
    assert lists_of(log.read(tmp_path / "log.parq", "x", **COLUMNS)) == {"u": ["a", "b"]}
    (tmp_path / "d.parquet.bak").touch()
    with pytest.raises(UserError, match=r"d.parquet.bak: is no \*.parquet file, in a folder of them; move it away"):
        log.read(tmp_path, "x", **COLUMNS)


def test_a_folder_without_parquet_parts_is_named(tmp_path):
    (tmp_path / "log.csv").write_text("x")
    with pytest.raises(UserError, match=r"is a folder without \*.parquet files; set config.data.path"):
        log.read(tmp_path, "x", **COLUMNS)
    (tmp_path / "log.csv").unlink()
    pl.DataFrame(schema=["user", "item", "time"]).write_parquet(tmp_path / "part.parquet")
    with pytest.raises(UserError, match="has no interactions"):
        log.read(tmp_path, "x", **COLUMNS)


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("user_id:token\titem_id:token\ttimestamp:float", {}),
        ("session_id:token\titem_id:token\ttimestamp:token", {}),
        ("user_id:token\tproduct_id:token\ttimestamp:float", {}),
        ("user_id:token\tbusiness_id:token\tdate:float", {}),
        ("user_id:token\tsong:token\ttimestamp:float", {}),  # the first column of the item file
        ("customer:token\titem_id:token\twhen:token", {"user": "customer", "timestamp": "when:token"}),
    ],
)
def test_recbole_columns_may_have_other_names(tmp_path, header, options):
    user, item, timestamp = header.split("\t")
    rows = [(timestamp, "review_id:token", item, user), *((t, "r", i, u) for u, i, t in ROWS)]
    (tmp_path / "x.inter").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    (tmp_path / "x.item").write_text(f"{item}\tname:token_seq\tprice:float\na\tapple\t1\nb\tbread\t2\n")
    dataset = recbole.read(tmp_path, "x", **options)
    assert lists_of(dataset) == EXPECTED
    assert dataset.item_texts == ["apple", "bread"]


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "who:token\titem_id:token\ttimestamp:float",
            {},
            "x.inter:1: no column user_id or session_id (it has who",
        ),
        (
            "who:token\titem_id:token\ttimestamp:float",
            {"user": "whom"},
            "set config.data.recbole.user to the user's",
        ),
        ("user_id:token\titem_id:token\trating:float", {}, "set config.data.recbole.timestamp to the timestamp's col"),
        (
            "user_id:token\tuser_id:token\titem_id:token\ttimestamp:float",
            {},
            "2 columns are called 'user_id'",
        ),
    ],
)
def test_recbole_columns_that_can_not_be_told_are_named(tmp_path, header, options, message):
    (tmp_path / "x.inter").write_text(header + "\nu\ta\t1\n")
    with pytest.raises(UserError) as caught:
        recbole.read(tmp_path, "x", **options)
    assert message in str(caught.value)


def test_recbole_items_without_an_id_are_named(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n")
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\n\na\tx\n\ty\n")
    with pytest.raises(UserError, match=r"x.item:4: no item_id:token"):
        recbole.read(tmp_path, "x")
