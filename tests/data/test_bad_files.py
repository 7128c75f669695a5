"""Every mistake in a user's file becomes one line that names the place and what to do."""

import json

import polars as pl
import pytest

from simgr_jax.data.readers import lcrec_files, log, minionerec, p5, recbole
from simgr_jax.errors import UserError

ITEMS = {"0": {"title": "a"}, "1": {"title": "b"}}
ROW = 'user_id,history_item_id,item_id\nu,"[0]",1\n'
TABLES = {"train/a.csv": ROW, "valid/a.csv": 'user_id,history_item_id,item_id\nu,"[0, 1]",0\n'}
TABLES["test/a.csv"] = 'user_id,history_item_id,item_id\nu,"[0, 1, 0]",1\n'
INTER = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n"
JSONL = '{"id": "a", "title": "x"}\n'


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict | list):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def expect(message, read, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    text = str(caught.value)
    assert message in text
    assert "; " in text and "\n" not in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "user_sequence.txt: no such file"),
        ({"user_sequence.txt": ""}, "user_sequence.txt: the file is empty"),
        ({"user_sequence.txt": "\n \n"}, "user_sequence.txt: has only blank lines"),
        ({"user_sequence.txt": "u a b\nv\n"}, "user_sequence.txt:2: user v has no items"),
        ({"user_sequence.txt": "u a b\n\nu c\n"}, "user_sequence.txt:3: user u is already on line 1"),
        ({"user_sequence.txt": "u a b\nv a x\n", "item_plain_text.txt": "a A\nb B"}, "user_sequence.txt:2: item x is"),
        ({"user_sequence.txt": "u a", "item_plain_text.txt": "a A\na B"}, "item_plain_text.txt:2: item a is"),
        ({"user_sequence.txt": "u a", "item_plain_text.txt": ""}, "item_plain_text.txt: the file is empty"),
        ({"user_sequence.txt": b"u a\nv caf\xe9\n"}, "user_sequence.txt:2: not UTF-8"),
        ({"user_sequence.txt/x": "u a"}, "user_sequence.txt: is a folder"),
        ({"user_sequence.txt": "u a b\rv a b\n"}, "user_sequence.txt:1: ends lines in carriage returns alone"),
    ],
)
def test_mistakes_in_p5_files_are_named(tmp_path, files, message):
    write(tmp_path, files)
    expect(message, p5.read, tmp_path, "x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file *.inter.json"),
        ({"a.inter.json": {"u": [1]}, "b.inter.json": {"u": [1]}}, "2 files match *.inter.json (a.inter.json, b."),
        ({"a.inter.json": ""}, "a.inter.json: the file is empty"),
        ({"a.inter.json": '{"u": [1, 2],\n"v": [1, 2'}, "a.inter.json:2: not JSON"),
        ({"a.inter.json": '{"u": [1], "u": [2]}'}, "a.inter.json:u: the key occurs more than once"),
        ({"a.inter.json": [1, 2]}, "a.inter.json: has a JSON list instead of an object"),
        ({"a.inter.json": "[" * 100_000}, "a.inter.json: JSON nested too deeply"),
        ({"a.inter.json": {}}, "a.inter.json: has no users"),
        ({"a.inter.json": {"u": [0], "v": []}}, "a.inter.json:v: the user has no items"),
        ({"a.inter.json": {"u": [0], "v": "01"}}, "a.inter.json:v: '01' is not a list of items"),
        ({"a.inter.json": {"v": [0, None]}}, "a.inter.json:v: [0, None] is not a list of items"),
        ({"a.inter.json": '{"v": ["\\ud83d"]}'}, "a.inter.json:v: ['\\ud83d'] is not a list of items"),
        ({"a.inter.json": '{"\\ud83d": ["a"]}'}, "a.inter.json: user '\\ud83d' has half a character"),
        ({"a.inter.json": {"v": ["a"]}, "a.item.json": '{"\\ud83d": {}}'}, "a.item.json: item '\\ud83d' has half a"),
        ({"a.inter.json": {"v": [0, 2]}, "a.item.json": ITEMS}, "a.inter.json:v: item 2 is not in"),
        ({"a.inter.json": {"v": [0]}, "a.item.json": {"0": "title"}}, "a.item.json:0: not an object"),
        ({"a.inter.json": {"v": [0, 2]}, "a.index.json": {"0": ["<a_1>"]}}, "a.inter.json:v: item 2 is not in"),
        (
            {"a.inter.json": {"v": [0]}, "a.item.json": ITEMS, "a.index.json": {"0": ["<a_1>"]}},
            "a.index.json:1: the item has no semantic ID",
        ),
    ],
)
def test_mistakes_in_lcrec_files_are_named(tmp_path, files, message):
    write(tmp_path, files)
    expect(message, lcrec_files.read, tmp_path, "x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train/a.csv": None}, "no file train/*.csv"),
        ({"valid/a.csv": ""}, "valid/a.csv: the file is empty"),
        ({"train/a.csv": "user_id,history_item_id,item_id\n"}, "train/a.csv: has no rows"),
        ({"train/a.csv": "user_id,item_id\nu,1\n"}, "train/a.csv:1: no column 'history_item_id'"),
        ({"train/a.csv": ROW + "v,[0,1\n"}, "train/a.csv:3: history_item_id '[0' is not a list"),
        (
            {"train/a.csv": ROW + 'v,"__import__(0)",1\n'},
            "train/a.csv:3: history_item_id '__import__(0)' is not a list",
        ),
        ({"train/a.csv": ROW + 'v,"[0]",\n'}, "train/a.csv:3: a row without user_id or item_id"),
        ({"train/a.csv": ROW + 'v,"[0]"x,1\n'}, "train/a.csv:3: can't be read"),
        ({"train/a.csv": '""' + ROW}, "train/a.csv:1: can't be read"),
        ({"train/a.csv": ROW + 'v,"[0]",1,2\n'}, "train/a.csv:3: 4 fields where line 1 has 3"),
        ({"train/a.csv": "user_id," + ROW}, "train/a.csv:1: 2 columns are called 'user_id'"),
        ({"train/a.csv": ROW + "v,[0x" + "f" * 4_000 + "],1\n"}, "train/a.csv:3: history_item_id '[0xff"),
        ({"train/a.csv": ROW + 'v,"[0]",7\n'}, "train/a.csv:3: item 7 is not in"),
        ({"test/a.csv": TABLES["valid/a.csv"]}, "test/a.csv:2: the history does not match the earlier rows of user u"),
        ({"test/a.csv": TABLES["test/a.csv"].replace("[0, 1, 0]", "[1, 1, 0]")}, "test/a.csv:2: the history does not"),
        ({"test/a.csv": b"user_id,history_item_id,item_id\nu,\xff,1\n"}, "test/a.csv:2: not UTF-8"),
    ],
)
def test_mistakes_in_minionerec_files_are_named(tmp_path, changed, message):
    files = {**TABLES, "a.item.json": ITEMS, **changed}
    write(tmp_path, {name: content for name, content in files.items() if content is not None})
    expect(message, minionerec.read, tmp_path, "x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file *.inter;"),
        ({"a.inter": ""}, "a.inter: the file is empty"),
        (
            {"a.inter": "user_id:token\titem_id:token\nu\ta\n"},
            "a.inter:1: no column timestamp or time or date",
        ),
        ({"a.inter": "user_id:token\titem_id:token\ttimestamp:float\n"}, "a.inter: has no interactions"),
        ({"a.inter": INTER + "u\tb\tnoon\n"}, "a.inter:3: timestamp:float 'noon' is not a number"),
        ({"a.inter": INTER + "u\tb\tnan\n"}, "a.inter:3: timestamp:float 'nan' is not a number"),
        ({"a.inter": INTER + "u\tb\n"}, "a.inter:3: no timestamp:float"),
        ({"a.inter": INTER + "\tb\t2\n"}, "a.inter:3: no user_id:token"),
        ({"a.inter": INTER + "u\tb\t2\t5\n"}, "a.inter:3: 4 fields where line 1 has 3"),
        ({"a.inter": INTER, "a.item": "title:token_seq\nx\n"}, "a.item:1: no column item_id (it has title"),
        ({"a.inter": INTER, "a.item": "item_id:token\tt:token\na\tx\na\ty\n"}, "a.item:3: item a has an earlier row"),
    ],
)
def test_mistakes_in_recbole_files_are_named(tmp_path, files, message):
    write(tmp_path, files)
    expect(message, recbole.read, tmp_path, "x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "log.csv: no such file; set config.data.path"),
        ({"log.csv": ""}, "log.csv: the file is empty"),
        ({"log.csv": "user,item\nu,a\n"}, "log.csv:1: no column 'time' (it has user, item); set config.data.log.user"),
        ({"log.csv": "user,item,time\n\n\n"}, "log.csv: has no interactions"),
        ({"log.csv": "user,item,time\n"}, "log.csv: has no interactions"),
        ({"log.csv": "user,item,time\nu,a,1\n\nu,b,2020-01-01\n"}, "log.csv:4: time '2020-01-01' is not a number"),
        ({"log.csv": 'user,item,time\n"u,v",a,1\n\nu,,2\n'}, "log.csv:4: no item"),
        ({"log.csv": "user,item,time\nu,a,1\nu,a,1,5\n"}, "log.csv:3: 4 fields where line 1 has 3"),
        ({"log.csv": b"user,item,time\nu,a,1\nu,caf\xe9,1\n"}, "log.csv:3: not UTF-8"),
        (
            {"log.csv": 'user,item,time\nu,a,1\nu,"b,2\n' + "u,c,3\n" * 30_000 + "u,d"},
            "log.csv:3: can't be read (unexpected end of data on line",
        ),
        (
            {"items.csv": "id,name\na,x\n"},
            "items.csv:1: no column 'title' (it has id, name); set config.data.log.items",
        ),
        ({"items.csv": "id,title\n\n,x\n"}, "items.csv:3: no id"),
        ({"items.csv": "id,title\na,x\na,y\n"}, "items.csv:3: item a has an earlier row"),
        ({"items.csv": "id,title\nb,x\n"}, "items.csv: no row for item a of"),
        ({"items.jsonl": JSONL + '{"id": "b", "title"\n'}, "items.jsonl:2: not JSON"),
        ({"items.jsonl": JSONL + "\n[1]\n"}, "items.jsonl:3: not an object"),
        ({"items.jsonl": JSONL + '{"title": "x"}\n'}, "items.jsonl:2: no 'id'"),
        ({"items.jsonl": JSONL + JSONL}, "items.jsonl:2: item a has an earlier row"),
        ({"items.jsonl": b'{"id": "a", "title": "caf\xe9"}'}, "items.jsonl:1: not UTF-8"),
        ({"items.txt": "a"}, "items.txt: the name ends in none of .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_mistakes_in_a_log_are_named(tmp_path, files, message):
    items = next((name for name in files if name.startswith("items")), None)
    write(tmp_path, {"log.csv": "user,item,time\nu,a,1\n", **files} if items else files)
    arguments = {"user": "user", "item": "item", "timestamp": "time"}
    if items:
        arguments |= {"items_file": str(tmp_path / items), "items_id": "id", "items_text": ("title",)}
    expect(message, log.read, tmp_path / "log.csv", "x", **arguments)


@pytest.mark.parametrize("user", ["NaN", '"\\ud83d"'])
def test_a_user_of_a_json_log_that_is_no_text_is_named(tmp_path, user):
    """A program that cuts a string in a character of two UTF-16 units writes such a half; pandas' missing value is
    NaN."""
    write(tmp_path, {"log.jsonl": f'{{"user": {user}, "item": "a", "time": 1}}\n'})
    expect("log.jsonl:1: ", log.read, tmp_path / "log.jsonl", "x", user="user", item="item", timestamp="time")


def test_mistakes_in_a_parquet_log_are_named(tmp_path):
    path, columns = tmp_path / "log.parquet", {"user": "user", "item": "item", "timestamp": "time"}
    path.write_bytes(b"PAR1 not really")
    expect("log.parquet: not a Parquet file", log.read, path, "x", **columns)
    pl.DataFrame({"user": ["u", "v"], "item": ["a", "a"], "time": [1, None]}).write_parquet(path)
    expect("log.parquet:row 2: no time", log.read, path, "x", **columns)
    pl.DataFrame({"user": ["u"], "item": [["a", "b"]], "time": [1]}).write_parquet(path)
    expect("log.parquet: column 'item' holds lists", log.read, path, "x", **columns)


@pytest.mark.parametrize("reader", [p5, lcrec_files, minionerec, recbole])
def test_a_path_that_is_not_a_folder_is_named(tmp_path, reader):
    expect("nowhere: no such folder; set config.data.path", reader.read, tmp_path / "nowhere", "x")
    (tmp_path / "file").write_text("x")
    expect("file: is a file, not a folder; set config.data.path", reader.read, tmp_path / "file", "x")
