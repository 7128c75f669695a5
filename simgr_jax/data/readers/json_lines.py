"""Reads JSON Lines: one JSON object per line, also compressed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from simgr_jax.data.readers.columns import Table, find, matches
from simgr_jax.data.readers.delimited import UTF16_MARKS, open_bytes
from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import is_text

_EXACT = 2**53  # Floats below this hold every integer.


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of each line that is not blank.

    Raises:
      UserError: a line is not UTF-8, not JSON or not an object, or the file can't be read.
    """
    try:
        with open_bytes(path) as file:
            if file.peek(2)[:2] in UTF16_MARKS:
                raise UserError(f"{path}: is UTF-16 text; convert the file, e.g. with iconv -f UTF-16 -t UTF-8")
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, f"{path}:{number}")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: can't be read ({first_line(error)}); copy it again from its source") from error


def read_columns(path: Path, columns: Mapping[str, str], remedy: str) -> Table:
    """Reads keys as columns of strings, with null for a missing value. Numbers are written out exactly.

    Columns other than `user`, `item` and `timestamp` may also hold truth values. If they hold nothing else, they are
    Booleans.

    Args: see `tables.read_columns`.

    Raises:
      UserError: as `rows`; the first object lacks the key of a user, item or timestamp; no object has the key of
        another column; a value is a list or an object; or an id is a float that may stand for several.
    """
    read_text = {ours: _READ_TEXT.get(ours, _text_or_truth) for ours in columns}
    names, values, lines = {}, {ours: [] for ours in columns}, []
    unknown = {ours: name for ours, name in columns.items() if ours not in _READ_TEXT}
    for line, row in rows(path):
        keys, place = list(row), f"{path}:{line}"
        if not lines:
            required = {ours: name for ours, name in columns.items() if ours in _READ_TEXT}
            names = {ours: keys[i] for ours, i in find(keys, required, place, remedy).items()}
        if unknown and (found := {ours: name for ours, name in unknown.items() if matches(keys, name)}):
            names |= {ours: keys[i] for ours, i in find(keys, found, place, remedy).items()}
            unknown = {ours: name for ours, name in unknown.items() if ours not in found}
        lines.append(line)
        for ours, read in read_text.items():
            name = names.get(ours)
            values[ours].append(None if name is None else read(row.get(name), name, place))
    if lines and unknown:
        raise UserError(f"{path}: no line has the key {next(iter(unknown.values()))!r}; correct the name")
    frame = pl.DataFrame({ours: _series(column) for ours, column in values.items()})
    return Table(frame, names or dict(columns), path, lambda row: str(lines[row]))


def id_text(value: Any, name: str, where: str) -> str | None:
    """An id as a string (see `text`).

    Raises:
      UserError: as `text`; or it is a float that is no integer, or is so large that it may stand for several.
    """
    if isinstance(value, float) and not math.isnan(value) and not (value.is_integer() and abs(value) < _EXACT):
        raise UserError(f"{where}: {name} {value!r} is a floating-point number; write ids as integers or as strings")
    return text(value, name, where)


def text(value: Any, name: str, where: str) -> str | None:
    """A value as a string; integers that pandas turned into floats become integers again, and its NaN is None.

    Raises:
      UserError: it is a list, an object or a truth value, or a string that is no Unicode text.
    """
    if isinstance(value, list | dict | bool) or (isinstance(value, str) and not is_text(value)):
        raise UserError(f"{where}: {name} {value!r:.40} is not a string or a number; correct the row")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)
    return None if value in (None, "") else str(value)


def _text_or_truth(value: Any, name: str, where: str) -> str | bool | None:
    return value if isinstance(value, bool) else text(value, name, where)


def _series(values: list[str | bool | None]) -> pl.Series:
    """Booleans if there are truth values and nothing else, else strings."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {bool}:
        return pl.Series(values, dtype=pl.Boolean)
    if bool in kinds:
        values = [str(value).lower() if isinstance(value, bool) else value for value in values]
    return pl.Series(values, dtype=pl.String)


# For the columns that every row has to have.
_READ_TEXT = {"user": id_text, "item": id_text, "timestamp": text}


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; convert the file, e.g. with iconv -t UTF-8") from error
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise UserError(f"{where}: not JSON ({error}); correct or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: not an object; write e.g. {{"user": "...", "item": "..."}}')
    return row
