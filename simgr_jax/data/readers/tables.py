"""Reads columns of a CSV, TSV or Parquet table with polars. Errors name the line that is wrong."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import require_file

SUFFIXES = (".csv", ".tsv", ".parquet")


def read_columns(path: Path, columns: Mapping[str, str], remedy: str, separator: str | None = None) -> pl.DataFrame:
    """Reads some columns of a table. CSV and TSV columns are strings, with null for an empty field.

    Args:
      columns: from the names of the result's columns to their names in the file.
      remedy: what to do if a column is missing, for the error message.
      separator: "\\t" for a tab-separated table without quoting, whatever the file's name; None to go by its suffix.

    Raises:
      UserError: the file is missing, empty or malformed, or lacks a column.
    """
    require_file(path)
    try:
        table = _scan(path, separator)
        names = table.collect_schema().names()
        for name in columns.values():
            if name not in names:
                raise UserError(f"{path}:1: no column {name!r} (it has {', '.join(names)}); {remedy}")
        return table.select(pl.col(name).alias(ours) for ours, name in columns.items()).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _located(path, separator, error) from error


def column_names(path: Path, separator: str | None = None) -> list[str]:
    require_file(path)
    try:
        return _scan(path, separator).collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _located(path, separator, error) from error


def read_interactions(
    path: Path, columns: Mapping[str, str], remedy: str, separator: str | None = None
) -> pl.DataFrame:
    """Reads a log as `from_frame` takes it: `user` and `item` (strings), `timestamp` (Int64 or Float64), no nulls.

    Args: see `read_columns`; `columns` names user, item and timestamp.

    Raises:
      UserError: as `read_columns`; or the log has no rows, or a row lacks a user, an item or a numeric timestamp.
    """
    frame = read_columns(path, columns, remedy, separator)
    nested = next((name for ours, name in columns.items() if frame[ours].dtype.is_nested()), None)
    if nested is not None:
        raise UserError(f"{path}: column {nested!r} holds lists or records; {remedy}")
    written = frame["timestamp"]
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()  # polars reads a blank line as a row
    frame = frame.with_columns(pl.col("user", "item").cast(pl.String), timestamp=_numbers(written))
    for column in ("user", "item", "timestamp"):
        bad = frame[column].is_null() & ~blank
        if not bad.any():
            continue
        where = f"{path}:{_place(path, separator, bad.arg_max())}"
        value = written[bad.arg_max()]
        if column != "timestamp" or value is None:
            raise UserError(f"{where}: no {columns[column]}; complete or remove the row")
        raise UserError(
            f"{where}: {columns[column]} {value!r:.40} is not a number; give the seconds since 1970, or correct the row"
        )
    if blank.all():
        raise UserError(f"{path}: has no interactions; copy the file again from its source")
    return frame.filter(~blank)


def _numbers(column: pl.Series) -> pl.Series:
    """Int64 if all values are integers, else Float64 with null for values that are not finite numbers."""
    if column.dtype in (pl.Date, pl.Datetime):
        column = column.dt.epoch("us") / 1_000_000
    integers = column.cast(pl.Int64, strict=False) if not column.dtype.is_float() else None
    if integers is not None and integers.null_count() == column.null_count():
        return integers
    numbers = column.cast(pl.Float64, strict=False)
    return numbers.set(~numbers.is_finite(), None)


def _scan(path: Path, separator: str | None) -> pl.LazyFrame:
    if separator is None and path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the name ends in none of {', '.join(SUFFIXES)}; convert or rename the file")
    if separator is None and path.suffix == ".parquet":
        return pl.scan_parquet(path)
    return pl.scan_csv(path, infer_schema=False, **_dialect(path, separator))


def _dialect(path: Path, separator: str | None) -> dict:
    if separator is not None:
        return {"separator": separator, "quote_char": None}
    return {"separator": "\t" if path.suffix == ".tsv" else ",", "quote_char": '"'}


def _is_text(path: Path, separator: str | None) -> bool:
    return separator is not None or path.suffix != ".parquet"


def _csv_rows(path: Path, separator: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of each row, the header first. Slow: for error messages only."""
    dialect = _dialect(path, separator)
    quoting = csv.QUOTE_NONE if dialect["quote_char"] is None else csv.QUOTE_MINIMAL
    # Bytes that are not UTF-8 become lone surrogates, which UTF-8 text never holds.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader, ended = csv.reader(file, delimiter=dialect["separator"], quoting=quoting), 0
        try:
            for fields in reader:
                yield (ended := reader.line_num), fields
        except csv.Error as error:
            # The field never ends, because its quote is not closed.
            raise UserError(
                f"{path}:{ended + 1}: can't be read ({error}); close the quote, or correct the row"
            ) from error


def _place(path: Path, separator: str | None, row: int) -> str:
    """The line number of data row `row` (from 0), or "row N" (from 1) in a Parquet file."""
    if not _is_text(path, separator):
        return f"row {row + 1}"
    return next(str(line) for i, (line, _) in enumerate(_csv_rows(path, separator)) if i == row + 1)


def _located(path: Path, separator: str | None, error: Exception) -> UserError:
    """Turns a polars error into one that names the line."""
    if not _is_text(path, separator):
        return UserError(f"{path}: not a Parquet file ({first_line(error)}); copy it again from its source")
    width = None
    for line, fields in _csv_rows(path, separator):
        if any("\udc80" <= c <= "\udcff" for field in fields for c in field):
            return UserError(f"{path}:{line}: not UTF-8 text; convert the file, e.g. with iconv -t UTF-8")
        width = len(fields) if width is None else width
        if len(fields) > width:
            return UserError(f"{path}:{line}: {len(fields)} fields where line 1 has {width}; quote or correct the row")
    return UserError(f"{path}: can't be read ({first_line(error)}); check that it is the right file")
