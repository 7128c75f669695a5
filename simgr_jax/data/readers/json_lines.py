"""Reads JSON Lines: one JSON object per line, also compressed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from simgr_jax.data.readers.columns import Table, find
from simgr_jax.data.readers.delimited import UTF16_MARKS, open_bytes
from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import is_text


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

    Args: see `tables.read_columns`.

    Raises:
      UserError: as `rows`; or the first object lacks a key, or a value is a list or an object.
    """
    names, values, lines = {}, {ours: [] for ours in columns}, []
    for line, row in rows(path):
        if not names:
            keys = list(row)
            names = {ours: keys[i] for ours, i in find(keys, columns, f"{path}:{line}", remedy).items()}
        lines.append(line)
        for ours, name in names.items():
            values[ours].append(text(row.get(name), name, f"{path}:{line}"))
    frame = pl.DataFrame(values, schema=dict.fromkeys(columns, pl.String))
    return Table(frame, names or dict(columns), path, lambda row: str(lines[row]))


def text(value: Any, name: str, where: str) -> str | None:
    """An id or a time as a string; integers that pandas turned into floats become integers again, and its NaN is None.

    Raises:
      UserError: it is a list, an object or a truth value, or a string that is no Unicode text.
    """
    if isinstance(value, list | dict | bool) or (isinstance(value, str) and not is_text(value)):
        raise UserError(f"{where}: {name} {value!r:.40} is not a string or a number; correct the row")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return None if value in (None, "") else str(value)


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
