"""Reads files of histories to continue, in parts, so that memory does not grow with the file.

A file of JSON lines, also compressed, has one history per line, oldest item first: {"user": "A1", "items": ["B7"]}. A
Parquet file has the columns `user` and `items`, a list.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from simgr_jax.data.readers import json_lines
from simgr_jax.data.readers.delimited import UTF16_MARKS, open_bytes, readable
from simgr_jax.errors import UserError, first_line

# Limits of a line and of a history, so that memory is bounded whatever a file holds.
_LONGEST_LINE = 1 << 24
_MOST_ITEMS = 10_000
_KEYS = ("user", "items")


class History(NamedTuple):
    user: str
    items: list[str]


class BadRow(NamedTuple):
    """
    Attributes:
      number: from 1; of the line, or of the Parquet row.
      reason: what is wrong with it, and what to do.
    """

    number: int
    reason: str


class Part(NamedTuple):
    """Rows of a file that follow each other.

    Attributes:
      end: how many rows there are up to its last one; blank lines count.
    """

    histories: list[History]
    bad: list[BadRow]
    end: int


def count_rows(path: Path) -> int:
    """
    Raises:
      UserError: the file can't be read.
    """
    with _open(path):
        if _is_parquet(path):
            return pq.ParquetFile(path).metadata.num_rows
        with open_bytes(path) as file:
            return sum(1 for _ in _lines(file))


def read_parts(path: Path, begin: int, size: int) -> Iterator[Part]:
    """Yields the rows after the first `begin`, `size` at once.

    Raises:
      UserError: the file can't be read, is UTF-16, or is a Parquet file without the columns.
    """
    with _open(path):
        rows = _parquet_rows(path, size) if _is_parquet(path) else _json_rows(path)
        numbered = itertools.islice(enumerate(rows, start=1), begin, None)
        read = ((number, _read(number, row)) for number, row in numbered)
        while chunk := list(itertools.islice(read, size)):
            histories = [found for _, found in chunk if isinstance(found, History)]
            yield Part(histories, [found for _, found in chunk if isinstance(found, BadRow)], end=chunk[-1][0])


def _open(path: Path) -> contextlib.AbstractContextManager[None]:
    """Within it, what libraries can't read is a UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a file of JSON lines or a Parquet file")
    return readable(path)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines; None for one that is too long."""
    while line := file.readline(_LONGEST_LINE):
        if len(line) < _LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def _json_rows(path: Path) -> Iterator[Any]:
    """Lines, as bytes."""
    with open_bytes(path) as file:
        if file.peek(2)[:2] in UTF16_MARKS:  # type: ignore[attr-defined]
            raise UserError(f"{path}: is UTF-16 text; convert the file, e.g. with iconv -f UTF-16 -t UTF-8")
        yield from _lines(file)


def _parquet_rows(path: Path, size: int) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    for key in _KEYS:
        if key not in schema.names:
            raise UserError(f"{path}: has no column {key!r}, only {', '.join(schema.names)}; give it user and items")
    kind = schema.field("items").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise UserError(f"{path}: column 'items' is {kind}, not a list; give each user one row with a list of items")
    for batch in file.iter_batches(batch_size=size, columns=list(_KEYS)):
        yield from batch.to_pylist()


def _read(number: int, row: bytes | dict[str, Any] | None) -> History | BadRow | None:
    """A row's history, or what is wrong with it; None for a blank line."""
    try:
        return _history(row)
    except UserError as error:
        return BadRow(number, str(error))


def _history(row: bytes | dict[str, Any] | None) -> History | None:
    """A row's history; None for a blank line.

    Raises:
      UserError: it has none.
    """
    form = 'write {"user": "...", "items": [...]}'
    if row is None:
        raise UserError(f"line: is longer than {_LONGEST_LINE:,} bytes; {form}")
    if isinstance(row, bytes):
        if not row.strip():
            return None
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"line: not JSON in UTF-8 ({first_line(error)}); {form}") from error
    if not isinstance(row, dict):
        raise UserError(f"line: not an object; {form}")
    for key in _KEYS:
        if key not in row:
            raise UserError(f"{key}: is missing; {form}")
    if unknown := [key for key in row if key not in _KEYS]:
        raise UserError(f"{unknown[0]}: is unknown; {form}")
    if not isinstance(row["items"], list):
        raise UserError(f"items: is not a list; {form}")
    if len(row["items"]) > _MOST_ITEMS:
        raise UserError(f"items: are {len(row['items']):,}; give the newest {_MOST_ITEMS:,} at most")
    return History(_id("user", row["user"]), [_id("items", item) for item in row["items"]])


def _id(key: str, value: Any) -> str:
    if (text := json_lines.id_text(value, key, "row")) is None:
        raise UserError(f"{key}: has an empty id; leave it out")
    return text
