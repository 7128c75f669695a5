"""Every row of a file is read, or the file is refused with the line: rows in = rows out + repeats."""

import csv
import gzip
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
ITEMS = {"items_id": "id", "items_text": ("title",)}


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
    dataset = log.read(tmp_path / "log.tsv", "x", **COLUMNS, items_file=str(tmp_path / "items.tsv"), **ITEMS)
    assert dict(zip(dataset.item_ids, dataset.item_texts, strict=True)) == {'"a': '"Big', "b": "blue", 'c"': 'red"'}


@pytest.mark.parametrize("rows", ['u,a,1,"19 tv\nv,b,2,20 tv"\n', 'u,a,1,"two\nlines"\n', 'u,a,1,"two\r\nlines"\r\n'])
def test_a_quoted_field_of_several_lines_is_refused_unless_the_config_allows_it(tmp_path, rows):
    with pytest.raises(UserError, match=r"log.csv:2: a quoted field of this row goes on to line 3.*multiline=True"):
        read(tmp_path / "log.csv", HEADER + rows)
    dataset = read(tmp_path / "log.csv", HEADER + "t,c,0,x\n" + rows, multiline=True)
    assert interactions(dataset) == [("t", "c", 0), ("u", "a", 1)]
    (note,) = dataset.notes
    assert "log.csv: 1 of 2 rows take several lines (they begin on line 3); if one should not, close its quote" in note


def test_a_mark_swallows_no_items(tmp_path):
    (tmp_path / "items.csv").write_text('id,title\na,"big\nb,blue\nc,red"\n')
    with pytest.raises(UserError, match=r"items.csv:2: a quoted field of this row goes on to line 4"):
        read(tmp_path / "log.csv", "user,item,time\nu,a,1\n", items_file=str(tmp_path / "items.csv"), **ITEMS)


@pytest.mark.parametrize("separator", [";", "|"])
def test_a_quoted_header_is_split_at_its_own_separator(tmp_path, separator):
    """As R and pandas write it."""
    rows = [("user", "item", "time"), ("u", "a, b", "1"), ("v", "c", "2")]
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL).writerows(rows)
    assert interactions(read(tmp_path / "log.csv", text.getvalue())) == [("u", "a, b", 1), ("v", "c", 2)]


def test_a_byte_order_mark_on_a_line_of_its_own_is_no_row(tmp_path):
    assert interactions(read(tmp_path / "log.csv", "\ufeff\nuser,item,time\nu,a,1\n")) == [("u", "a", 1)]


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_a_compressed_file_without_its_suffix_says_so(tmp_path, compress):
    with pytest.raises(UserError, match=r"log.csv: is compressed; end its name in .gz or .zst"):
        read(tmp_path / "log.csv", compress(b"user,item,time\nu,a,1\n"))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".tsv"])
def test_files_without_quotes_refuse_the_option(tmp_path, kind):
    (tmp_path / f"log{kind}").touch()
    with pytest.raises(UserError, match=r"config.data.log.multiline: is not read"):
        log.read(tmp_path / f"log{kind}", "x", **COLUMNS, multiline=True)


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
        ('u,"a\rb",1,x\nu,c,1,x\n', "log.csv:2: a quoted field of this row holds a carriage return; close the quote"),
        ('u,"ab",1,x\nu,c\rd,1,x\n', "log.csv:3: has a carriage return that is not before a newline"),
        # It would end a row for some programs, and the row after it would vanish.
        ("u,1\rv,2\nu,2,3\n", "log.csv:2: has a carriage return that is not before a newline"),
        ("u,a,1,x\nu,b,2,y\r", "log.csv:3: has a carriage return that is not before a newline"),
        # Without it, this user would be another one.
        ("u,a,1,x\n\nu\r,a,1,x\n", "log.csv:4: has a carriage return that is not before a newline"),
        ("u,a,1,x\nu,a,2,x\r\r\n", "log.csv:3: has a carriage return that is not before a newline"),
        ('u,a,1,"x"\nu,a,2,x\r\r\n', "log.csv:3: has a carriage return that is not before a newline"),
        ("u,a,1,x\n\nu,a\0,2,x\n", "log.csv:4: has NUL characters"),
        ('u,a,1,"x"\nu,a\0,2,x\n', "log.csv:3: has NUL characters"),
    ],
)
def test_a_file_that_would_lose_rows_is_refused_with_the_line(tmp_path, rows, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "log.csv", HEADER + rows)
    assert message in str(caught.value)


def test_quoted_fields_may_hold_lines_and_marks(tmp_path):
    titles = {"b1": "two\nlines, and so on", "b2": 'a 19" tv,\n\n1, 2 or 3 pieces', "b3": "", "b4": "x\r\ny"}
    table = io.StringIO()
    csv.writer(table).writerows([("id", "title"), *titles.items()])
    (tmp_path / "items.csv").write_text(table.getvalue(), newline="")
    options = {"items_file": str(tmp_path / "items.csv"), "multiline": True, **ITEMS}
    dataset = read(tmp_path / "log.csv", "user,item,time\nu,b1,1\nu,b2,2\nu,b3,3\nu,b4,4\n", **options)
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
    options = {"multiline": True} if "csv" in kind else {}
    dataset = recbole.read(tmp_path, "x") if kind == ".inter" else log.read(path, "x", **COLUMNS, **options)
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
