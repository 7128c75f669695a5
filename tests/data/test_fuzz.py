"""Damaged files of every format: each becomes one line that names the file, or is read whole, with no row lost."""

import csv
import gzip
import io
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simgr_jax.data.readers import lcrec_files, log, minionerec, p5, recbole
from simgr_jax.errors import UserError

CASES = 100_000  # of each format

ROWS = [("u1", "i1", 10), ("u1", "i2", 11), ("u2", "i2", 12), ("u2", "i3", 13), ("u2", "i1", 13), ("u3", "i 4", 20)]
TITLES = {"i1": "Red tv", "i2": "A lamp", "i3": "", "i 4": "Café"}
TOKENS = {item: [f"<a_{i}>", f"<b_{i % 2}>"] for i, item in enumerate(TITLES)}

# What is put into files: what programs write by mistake, and what parsers take for something else.
PIECES = [
    *(b"\n", b"\r", b"\r\n", b"\n\n", b" ", b"\t", b",", b";", b"|", b'"', b'""', b"'", b"\\", b"\0", b"\x1a", b"\x1c"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff", b"\xe9", b"\xc3\xa9", b"\xc2\xa0", b"\xc2\x85"),
    *(b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xef\xbf\xbd", b"\\ud800", b"\\u0000", b"\\n", b"\\d", b"\xd9\xa3"),
    *(
        b"0",
        b"-1",
        b"1e3",
        b"1e999",
        b"-0",
        b"1.5",
        b"007",
        b"0x1f",
        b"1_0",
        b"nan",
        b"NaN",
        b"inf",
        b"null",
        b"None",
        b"true",
    ),
    *(b"9" * 19, b"9" * 20, b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"2024-02-30", b"2024-02-29T12:00:00Z"),
    *(b"[", b"]", b"{", b"}", b"[]", b"{}", b":", b"()", b"[" * 900 + b"]" * 900, b"(" * 300, b"\\", b"#", b"="),
    *(b'"a\nb"', b'"a,b"', b'"a""b"', b'19" tv', b"=1+1", b"x" * 2000),
]


def csv_bytes(rows, delimiter=",", end="\n"):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue().encode()


def zstd(data):
    file = pa.BufferOutputStream()
    with pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(data)
    return file.getvalue().to_pybytes()


def decompressed(name, data):
    if name.endswith(".gz"):
        return gzip.decompress(data)
    return pa.CompressedInputStream(pa.BufferReader(data), "zstd").read() if name.endswith(".zst") else data


def parquet_bytes(columns, **options):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, write_page_checksum=True, **options)
    return file.getvalue()


def jsonl_bytes(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def histories(start):
    """Rows of a MiniOneRec table: each user's next item after `start` of them."""
    rows = [("user_id", "history_item_id", "item_id")]
    for user in ("u1", "u2", "u3"):
        items = [1, 0, 2, 3, 1][: start + 2]
        rows.append((user, str(items[: start + 1]), items[start + 1]))
    return csv_bytes(rows)


LOG = [("user", "item", "time"), *ROWS]
ITEMS = [("id", "title"), *TITLES.items()]
ITEM_JSON = json.dumps({item: {"title": title} for item, title in TITLES.items()}).encode()
NUMBERED = {str(i): {"title": f"Thing {i}"} for i in range(4)}
INTER = {"u1": ["i1", "i2"], "u2": ["i2", "i3", "i1"], "u3": ["i 4"]}
P5 = b"u1 i1 i2\nu2 i2 i3 i1\nu3 i4\n"
RECBOLE = [("user_id:token", "item_id:token", "timestamp:float"), *ROWS]
COLUMNS = dict(zip(("user", "item", "timestamp"), zip(*ROWS, strict=True), strict=True))

# By format: sets of valid files, the first of which holds the interactions.
VALID = {
    "p5": [
        {"user_sequence.txt": P5},
        {"user_sequence.txt": P5.replace(b"\n", b"\r\n"), "item_plain_text.txt": b"i1 Red tv\ni2 Lamp\ni3\ni4 Cup\n"},
    ],
    "lcrec": [
        {"a.inter.json": json.dumps(INTER).encode()},
        {"a.inter.json": json.dumps(INTER, indent=0).encode(), "a.item.json": ITEM_JSON},
        {
            "a.inter.json": json.dumps({"7": [0, 1], "8": [3]}).encode(),
            "a.item.json": json.dumps(NUMBERED).encode(),
            "a.index.json": json.dumps(dict(zip(NUMBERED, TOKENS.values(), strict=True))).encode(),
        },
    ],
    "minionerec": [
        {"train/a.csv": histories(0), "valid/a.csv": histories(1), "test/a.csv": histories(2)},
        {
            **{"train/a.csv": histories(0), "valid/a.csv": histories(1), "test/a.csv": histories(2)},
            "a.item.json": json.dumps(NUMBERED).encode(),
        },
    ],
    "recbole": [
        {"a.inter": csv_bytes(RECBOLE, "\t")},
        {
            "a.inter": csv_bytes(RECBOLE, "\t", "\r\n"),
            "a.item": csv_bytes([("item_id:token", "title:token_seq"), *TITLES.items()], "\t"),
        },
    ],
    "csv": [
        {"log.csv": csv_bytes(LOG)},
        {"log.csv": csv_bytes(LOG, ";", "\r\n")},
        {"log.csv": csv_bytes([("title", "time", "user", "item"), *(("a, b", *row[::-1]) for row in ROWS)])},
        {"log.csv": csv_bytes(LOG), "items.csv": csv_bytes([*ITEMS, ("i5", 'a "big"\nlamp')])},
        {"log.csv.gz": gzip.compress(csv_bytes(LOG), mtime=0)},
    ],
    "tsv": [
        {"log.tsv": csv_bytes(LOG, "\t")},
        {"log.tsv": csv_bytes(LOG, "\t", "\r\n"), "items.tsv": csv_bytes(ITEMS, "\t")},
        {"log.tsv.zst": zstd(csv_bytes(LOG, "\t"))},
    ],
    "jsonl": [
        {"log.jsonl": jsonl_bytes(dict(zip(LOG[0], row, strict=True)) for row in ROWS)},
        {
            "log.jsonl": jsonl_bytes(dict(zip(LOG[0], row, strict=True)) for row in ROWS),
            "items.jsonl": jsonl_bytes({"id": item, "title": ["a", title]} for item, title in TITLES.items()),
        },
    ],
    "parquet": [
        {"log.parquet": parquet_bytes(dict(zip(LOG[0], zip(*ROWS, strict=True), strict=True)))},
        {
            "log.parquet": parquet_bytes(
                dict(zip(LOG[0], zip(*ROWS, strict=True), strict=True)), row_group_size=2, compression="zstd"
            ),
            "items.parquet": parquet_bytes(dict(zip(ITEMS[0], zip(*TITLES.items(), strict=True), strict=True))),
        },
    ],
}


def damage(name, data, generator):
    """A valid file with one to three changes, half of the time below its compression."""
    compress = {".gz": lambda data: gzip.compress(data, mtime=0), ".zst": zstd}.get(Path(name).suffix)
    if compress and generator.random() < 0.5:
        return compress(damage("", decompressed(name, data), generator))
    for _ in range(generator.integers(1, 4)):
        data = MUTATIONS[generator.integers(len(MUTATIONS))](data, generator)
    return data


def place(data, generator):
    return int(generator.integers(len(data) + 1))


def span(data, generator):
    """A short stretch of the data, or now and then a long one."""
    start = place(data, generator)
    return start, start + int(generator.integers(1, len(data) + 2 if generator.random() < 0.2 else 5))


def flip_bytes(data, generator):
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4) if data else 0):
        changed[generator.integers(len(data))] ^= int(generator.integers(1, 256))
    return bytes(changed)


def flip_a_bit(data, generator):
    changed = bytearray(data)
    if data:
        changed[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
    return bytes(changed)


def cut(data, generator):
    return data[: place(data, generator)]


def remove(data, generator):
    start, end = span(data, generator)
    return data[:start] + data[end:]


def repeat(data, generator):
    start, end = span(data, generator)
    return data[:end] + data[start:]


def insert(data, generator):
    start = place(data, generator)
    return data[:start] + PIECES[generator.integers(len(PIECES))] + data[start:]


def put_in_front(data, generator):
    return PIECES[generator.integers(len(PIECES))] + data


def change_lines(data, generator):
    """Removes, repeats, moves or empties a line."""
    lines = data.split(b"\n")
    here, there = generator.integers(len(lines), size=2)
    match generator.integers(4):
        case 0:
            del lines[here]
        case 1:
            lines.insert(there, lines[here])
        case 2:
            lines.insert(there, lines.pop(here))
        case 3:
            lines[here] = b""
    return b"\n".join(lines)


def change_fields(data, generator):
    """Removes, repeats, quotes or replaces a field."""
    parts = re.split(rb"([][\n\t,; :{}]+)", data)
    here = 2 * int(generator.integers(len(parts) // 2 + 1))
    match generator.integers(4):
        case 0:
            del parts[here : here + 2]
        case 1:
            parts[here:here] = parts[here : here + 2]
        case 2:
            parts[here] = b'"' + parts[here] + b'"'
        case 3:
            parts[here] = PIECES[generator.integers(len(PIECES))]
    return b"".join(parts)


MUTATIONS = [flip_bytes, flip_a_bit, cut, remove, repeat, insert, put_in_front, change_lines, change_fields]


def read(kind, folder, files):
    first, *others = files
    match kind:
        case "p5":
            return p5.read(folder, "x")
        case "lcrec":
            return lcrec_files.read(folder, "x")
        case "minionerec":
            return minionerec.read(folder, "x")
        case "recbole":
            return recbole.read(folder, "x")
    options = {"items_file": str(folder / others[0]), "items_id": "id", "items_text": ("title",)} if others else {}
    multiline = "items.csv" in others  # a title there takes two lines
    return log.read(folder / first, "x", user="user", item="item", timestamp="time", multiline=multiline, **options)


def num_rows(kind, files):
    """The number of interactions that the files hold, counted without the readers; None if that can't be told."""
    name, data = next(iter(files.items()))
    if kind == "parquet":
        return len(ROWS)  # Every page has a checksum, and the footer says their number in several places.
    text = decompressed(name, data).decode("utf-8-sig")
    match kind:
        case "p5":
            return sum(len(line.split()) - 1 for line in re.split("\r\n?|\n", text) if line.strip())
        case "lcrec":
            return sum(len(items) for items in json.loads(text).values())
        case "minionerec":
            return num_minionerec_rows(files)
        case "jsonl":
            return sum(bool(line.strip()) for line in text.split("\n"))
    if kind == "csv" and '"' in text:
        return num_quoted_rows(text)
    return sum(line not in ("", "\r") for line in text.split("\n")) - 1


def num_minionerec_rows(files):
    """A user's first row holds the history as well, a list as Python writes it, which may end in a comment."""
    count, users = 0, set()
    for name, data in files.items():
        if name.endswith(".csv"):
            header, *rows = filter(
                None, csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), skipinitialspace=True)
            )
            names = [name.strip().casefold() for name in header]
            user, history = names.index("user_id"), names.index("history_item_id")
            for row in rows:
                count += 1 if row[user] in users else 1 + len(re.findall(r"[^][,\s]+", row[history].partition("#")[0]))
                users.add(row[user])
    return count


def num_quoted_rows(text):
    """None if a quotation mark is not as Python writes it."""
    for separator in ",;\t|":
        try:
            reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True)
            header, *rows = filter(None, reader)
        except (csv.Error, ValueError):
            continue
        if {"user", "item", "time"} <= set(header):
            # A field that only looks quoted in the middle is not regular.
            return len(rows) if all(len(row) <= len(header) for row in rows) else None
    return None


def num_repeats(dataset):
    found = [re.match(r"([\d,]+) of [\d,]+ interactions repeat another's", note) for note in dataset.notes]
    return sum(int(match[1].replace(",", "")) for match in found if match)


def check(kind, folder, files):
    """Reads the files, which may be damaged."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    try:
        dataset = read(kind, folder, files)
    except UserError as error:
        message = str(error)
        assert message.startswith((str(folder), "config.")) and "; " in message, message
        assert len(message.splitlines()) == 1, message
        return False
    finally:
        for name in files:
            (folder / name).unlink()
    sequences, size = dataset.sequences, len(dataset.sequences.values)
    assert len(dataset.user_ids) == len(set(dataset.user_ids)) == len(sequences)
    assert len(dataset.item_ids) == len(set(dataset.item_ids))
    assert sequences.offsets[-1] == size and (np.diff(sequences.offsets) > 0).all()
    assert (sequences.values >= 0).all() and (sequences.values < dataset.num_items).all()
    assert dataset.item_texts is None or len(dataset.item_texts) == dataset.num_items
    assert dataset.timestamps is None or (len(dataset.timestamps) == size and np.isfinite(dataset.timestamps).all())
    expected = num_rows(kind, files)
    assert expected is None or size + num_repeats(dataset) == expected, f"{size} rows of {expected}"
    return True


def fuzz(kind, folder, cases):
    """Returns how many of the cases were read without an error."""
    whole = 0
    for case in cases:
        generator = np.random.default_rng(case)
        files = dict(VALID[kind][generator.integers(len(VALID[kind]))])
        damaged = list(files)[generator.integers(len(files))]
        files[damaged] = damage(damaged, files[damaged], generator)
        try:
            whole += check(kind, folder, files)
            assert os.fstat(2).st_size == 0, "something was written to stderr"
        except Exception as error:
            raise AssertionError(f"case {case} of {kind}: {files}") from error
    return whole


@pytest.mark.parametrize("kind", VALID)
def test_valid_files_are_read_whole(kind, tmp_path):
    assert all(check(kind, tmp_path, files) for files in VALID[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_a_damaged_file_is_named_or_read_whole(kind, tmp_path, capfd):
    """Native code writes to the file behind stderr, which pytest has put there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = fuzz(kind, tmp_path, range(CASES))
    # Much damage, e.g. within a title, is none to the format.
    assert 0.01 < whole / CASES < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("files", VALID["parquet"])
def test_no_flipped_byte_of_a_parquet_log_changes_an_interaction(files, tmp_path):
    """At every place of a file whose pages have checksums. Its footer has none."""
    generator, path = np.random.default_rng(0), tmp_path / "log.parquet"
    whole, expected, detected = files["log.parquet"], None, 0
    for place in (None, *range(len(whole))):
        damaged = bytearray(whole)
        if place is not None:
            damaged[place] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            found = interactions(read("parquet", tmp_path, ["log.parquet"]))
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            detected += 1
        else:
            expected = expected or found
            assert found == expected, f"place {place}"
    assert detected > len(whole) // 2


def interactions(dataset):
    """The triples (user, item, time), sorted."""
    users = np.repeat(dataset.user_ids, dataset.sequences.lengths)
    items = np.array(dataset.item_ids)[dataset.sequences.values]
    return sorted(zip(users.tolist(), items.tolist(), dataset.timestamps.tolist(), strict=True))
