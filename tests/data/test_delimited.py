"""Every row of a file is read, or the file is refused with the line: rows in = rows out + repeats."""

import csv
import io
import json
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import polars as pl
import pyarrow as pa
import pytest

from simgr_jax.data.readers import delimited, log, recbole
from simgr_jax.errors import UserError

COLUMNS = {"user": "user", "item": "item", "timestamp": "time"}
HEADER = "user,item,time,title\n"


def read(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return log.read(path, "x", **COLUMNS, **options)


def interactions(dataset):
    """The triples (user, item, time), sorted."""
    users = [user for user, items in zip(dataset.user_ids, dataset.sequences, strict=True) for _ in items]
    items = [dataset.item_ids[i] for i in dataset.sequences.values]
    return sorted(zip(users, items, dataset.timestamps.tolist(), strict=True))


def test_a_mark_inside_a_field_is_a_character(tmp_path):
    rows = [f"u{i},i{i},{i},{'19' + chr(34) + ' tv' if i in (7, 1_900) else 'tv'}\n" for i in range(2_000)]
    dataset = read(tmp_path / "log.csv", HEADER + "".join(rows))
    assert interactions(dataset) == sorted((f"u{i}", f"i{i}", i) for i in range(2_000))


def test_a_tsv_has_no_quotes(tmp_path):
    dataset = read(tmp_path / "log.tsv", 'user\titem\ttime\nu\t"a\t1\nu\tb\t2\nu\tc"\t3\n')
    assert interactions(dataset) == [("u", '"a', 1), ("u", "b", 2), ("u", 'c"', 3)]
    (tmp_path / "items.tsv").write_text('id\ttitle\n"a\t"Big\nb\tblue\nc"\tred"\n')
    items = {"items_file": str(tmp_path / "items.tsv"), "items_id": "id", "items_text": ("title",)}
    dataset = log.read(tmp_path / "log.tsv", "x", **COLUMNS, **items)
    assert dict(zip(dataset.item_ids, dataset.item_texts, strict=True)) == {'"a': '"Big', "b": "blue", 'c"': 'red"'}


def assert_takes_in_rows(folder, text):
    """The log is refused, because a quoted field in its first row takes in others."""
    with pytest.raises(UserError, match=r"log.csv:2: a quoted field of this row goes on to line .* look like rows"):
        read(folder / "log.csv", text)


@pytest.mark.parametrize(
    "rows",
    [
        'a,x,1,"19 tv\nb,y,2\nc,z,3,20 tv"\n',
        'a,x,1,"19 tv\nb,y,n/a,x\nc,z,3,20 tv"\n',
        'a,x,1,"19 tv\nb,y,2\nc,z,n/a,20 tv"\n',
        'a,x,1,"19 tv\nb,y,2,x\nc,z,n/a,20 tv"\n',
        'a,x,1,"19, tv\nb,y,2,x\nc,z,3,20 tv"\n',
        'a,x,1,"19 tv\nb,y,2,x\nc,z,3,20, tv"\n',
        'a,x,1,"19, tv\nc,z,3,20, tv"\n',
        'a,x,1,"19 tv\r\nb,y,2\r\nc,z,3,20 tv"\r\n',
        'a,x,2020-01-01,"19, tv\nb,y,2020-01-02\n20, tv"\n',
    ],
)
def test_a_mark_swallows_no_rows_although_one_of_them_is_odd(tmp_path, rows):
    assert_takes_in_rows(tmp_path, HEADER + rows)


@pytest.mark.parametrize(
    "rows",
    [
        'u,a,"19, tv,100\nv,b,20 tv",200\n',
        'u,a,"19, tv,100\nv,b,20, tv",200\n',
        'u,a,"19 tv,100\nv,b\nw,c,20 tv",200\n',
        'u,a,"19\nv,b,a, tv,200\nw,c,20 tv",300\n',
    ],
)
def test_a_mark_before_the_time_swallows_no_rows(tmp_path, rows):
    assert_takes_in_rows(tmp_path, "user,item,title,time\n" + rows)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("user,item,time,title", 'u,a,1700000000,"Fits well, in red, 10, or 12\nbought in 2019, used it\n2020"'),
        ("user,item,time,title", 'u,a,1,"\n1. small, light\n2. cheap, too\n"'),
        ("user,item,title,time", 'u,a,"two\nlines, and more",1'),
        ("user,item,title,time", 'u,a,"Nice, long, text\nof words, in, a, row\n",1'),
        ("time,title,user,item", '1700000000,"In 2019, I bought\n2020, again, it was, 1",u,a'),
    ],
)
def test_prose_of_several_lines_is_read(tmp_path, header, row):
    assert len(interactions(read(tmp_path / "log.csv", f"{header}\n{row}\n"))) == 1


@pytest.mark.parametrize(
    ("rows", "is_read"),
    [
        ('x2,"19 tv\nx3\nx4,20 tv"\n', False),
        ('x2,"19, tv\nx4,20, tv"\n', False),
        ('x2,"19, tv\nx4,\n20, tv"\n', False),
        ('B00X4,"19 tv\n0316769487\n03167,20 tv"\n', False),
        ('apple,"19 tv\nbanana\ncherry,20 tv"\n', False),
        ('apple,"Sweet, juicy\nRed, and\n\nRound"\n', True),
        ('B00X4YZW12,"Made in\n2020\n19, 20 or 21 inches"\n', True),
    ],
)
def test_a_mark_swallows_no_items_although_one_of_them_is_odd(tmp_path, rows, is_read):
    (tmp_path / "items.csv").write_text("id,title\n" + rows)
    (tmp_path / "log.csv").write_text(f"user,item,time\nu,{rows.partition(',')[0]},1\n")
    items = {"items_file": str(tmp_path / "items.csv"), "items_id": "id", "items_text": ("title",)}
    if is_read:
        assert log.read(tmp_path / "log.csv", "x", **COLUMNS, **items).num_items == 1
        return
    with pytest.raises(UserError, match=r"items.csv:2: a quoted field of this row goes on to line .* look like rows"):
        log.read(tmp_path / "log.csv", "x", **COLUMNS, **items)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # One mark that is never closed.
        ('u,a,1,x\nu,b,2,"big\nu,c,3,y\n', "log.csv:3: can't be read (unexpected end of data on line 4)"),
        # A second one opens a field, or stands inside one.
        ('u,a,1,"big\nu,b,2,y\nu,c,3,"small\n', "log.csv:2: can't be read (',' expected after '\"' on line 4)"),
        ('u,a,1,"big\nu,b,2,y\nu,c,3,19" tv\n', "log.csv:2: can't be read (',' expected after '\"' on line 4)"),
        # A second one ends a field: legal CSV, but the lines between are rows.
        ('u,a,1,"big\nu,b,2,y\n\nu,c,3,small"\nu,d,4,z\n', "log.csv:2: a quoted field of this row goes on to line 5"),
        ('u,a,1,"big\nu,b,2,small"\n', "log.csv:2: a quoted field of this row goes on to line 3"),
        ('u,"a,1,x\nu,b",2,x\n', "log.csv:2: a quoted field of this row goes on to line 3"),
        ('u,a,1,"x"y\n', "log.csv:2: can't be read (',' expected after '\"')"),
        # Rows without anything are not blank lines.
        ("u,a,1,x\n\n,,,x\n", "log.csv:4: no user"),
        ('u,a,1,"x"\n\n,,,x\n', "log.csv:4: no user"),
        ('u,a,1,x\n"",a,1,x\n', "log.csv:3: no user"),
        ('"",a,1,x\nu,a,1,x\n', "log.csv:2: no user"),
        ('u,a,1,"x",y\n', "log.csv:2: 5 fields where line 1 has 4"),
        ("u,a,1,x,y\n", "log.csv:2: 5 fields where line 1 has 4"),
        ("u,a,1,x\n" * 3_000 + "u,a,1,x,y\n", "log.csv:3002: 5 fields where line 1 has 4"),
        ('u,"a\rb",1,x\nu,c\rd,1,x\n', "log.csv:3: can't be read"),
        # Without it, this user would be another one.
        ("u,a,1,x\n\nu\r,a,1,x\n", "log.csv:4: a field ends in a carriage return"),
        ("u,a,1,x\nu,a,2,x\r\r\n", "log.csv:3: a field ends in a carriage return"),
        ('u,a,1,"x\r\r\ny"\nu,a,2,x\r\r\n', "log.csv:4: a field ends in a carriage return"),
        ("u,a,1,x\n\nu,a\0,2,x\n", "log.csv:4: has NUL characters"),
        ('u,a,1,"x"\nu,a\0,2,x\n', "log.csv:3: has NUL characters"),
    ],
)
def test_a_file_that_would_lose_rows_is_refused_with_the_line(tmp_path, rows, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "log.csv", HEADER + rows)
    assert message in str(caught.value)


def test_a_title_that_opens_with_a_mark_swallows_no_items(tmp_path):
    (tmp_path / "items.csv").write_text('id,title\na,"big\nb,blue\nc,red"\n')
    items = {"items_file": str(tmp_path / "items.csv"), "items_id": "id", "items_text": ("title",)}
    with pytest.raises(UserError, match=r"items.csv:2: a quoted field of this row goes on to line 4"):
        read(tmp_path / "log.csv", "user,item,time\nu,a,1\n", **items)


def test_quoted_fields_may_hold_lines_and_marks(tmp_path):
    titles = {"b1": "two\nlines, and so on", "b2": 'a 19" tv,\n\n1, 2 or 3 pieces', "b3": "", "b4": "x\r\ny"}
    table = io.StringIO()
    csv.writer(table).writerows([("id", "title"), *titles.items()])
    (tmp_path / "items.csv").write_text(table.getvalue(), newline="")
    items = {"items_file": str(tmp_path / "items.csv"), "items_id": "id", "items_text": ("title",)}
    dataset = read(tmp_path / "log.csv", "user,item,time\nu,b1,1\nu,b2,2\nu,b3,3\nu,b4,4\n", **items)
    assert dataset.item_texts == ["two lines, and so on", 'a 19" tv, 1, 2 or 3 pieces', "", "x y"]


def test_a_quoted_field_may_be_long(tmp_path):
    row = 'u,a,1,"' + "a long text, " * 20_000 + '"\n'
    assert interactions(read(tmp_path / "log.csv", HEADER + row)) == [("u", "a", 1)]


def test_repeats_are_counted_and_said(tmp_path):
    dataset = read(tmp_path / "log.csv", "user,item,time\nu,a,1\nu,a,1\nu,a,2\nu,a,1\n")
    assert interactions(dataset) == [("u", "a", 1), ("u", "a", 2)]
    (note,) = dataset.notes
    assert note.startswith("2 of 4 interactions repeat another's user, item and timestamp")
    assert not read(tmp_path / "log.csv", "user,item,time\nu,a,1\nu,a,2\n").notes


ids = st.text(st.sampled_from("ab\"',;| é.0"), min_size=1, max_size=4).filter(str.strip).map(str.strip)
rows_of_ids = st.lists(
    st.tuples(ids, ids, st.integers(-(2**40), 2**40), st.text('ab", \n;', max_size=8)), min_size=1, max_size=30
)


@pytest.mark.parametrize("kind", [".csv", ";.csv", ".tsv", ".jsonl", ".parquet", ".inter", ".csv.gz", ".tsv.zst"])
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(rows=rows_of_ids)
def test_rows_in_are_rows_out_and_repeats(tmp_path, kind, rows):
    path = tmp_path / f"log{kind.removeprefix(';')}"
    names = ("user", "item", "time", "title")
    if kind == ".parquet":
        pl.DataFrame(rows, schema=names, orient="row").write_parquet(path)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    elif "csv" in kind:
        text = io.StringIO()
        csv.writer(text, delimiter=kind[0] if kind[0] == ";" else ",").writerows([names, *rows])
        with pa.output_stream(str(path), compression="detect") as file:
            file.write(text.getvalue().encode())
    else:
        if kind == ".inter":
            names = ("user_id:token", "item_id:token", "timestamp:float", "title:token_seq")
        lines = ["\t".join(map(str, row)).replace("\n", " ") for row in [names, *rows]]
        with pa.output_stream(str(path), compression="detect") as file:
            file.write("".join(line + "\n" for line in lines).encode())
    try:
        dataset = recbole.read(tmp_path, "x") if kind == ".inter" else log.read(path, "x", **COLUMNS)
    except UserError as error:
        assert "look like rows" in str(error)  # a title of several lines may look like rows
        assert any("\n" in title for *_, title in rows)
        return
    assert interactions(dataset) == sorted({row[:3] for row in rows})


@pytest.mark.parametrize(("kind", "separator"), [(".csv", ","), (".tsv", "\t")])
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(text=st.text('u1"\n\r,\t ', max_size=60))
def test_any_text_without_quoting_is_read_whole_or_refused(tmp_path, kind, separator, text):
    try:
        with mock.patch.object(delimited, "_CHUNK_BYTES", 5):
            dataset = read(tmp_path / f"log{kind}", separator.join(("user", "item", "time")) + "\n" + text)
    except UserError:
        return
    if kind == ".csv" and '"' in text:
        return
    expected = set()
    for line in text.split("\n"):
        if line := line.removesuffix("\r"):
            fields = line.split(separator)
            fields = [field.lstrip(" ") for field in fields] if kind == ".csv" else fields
            expected.add((fields[0], fields[1], int(fields[2])))
    assert interactions(dataset) == sorted(expected)
