"""Reads columns of a table: CSV, TSV, JSON Lines or Parquet. Errors name the line that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from simgr_jax.data.item_text import join_fields
from simgr_jax.data.readers import delimited, json_lines
from simgr_jax.data.readers.columns import Notes, Table, find
from simgr_jax.data.readers.values import UNITS, decoded, ids, times
from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import require_file

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".parq")
PARQUET = (".parquet", ".parq")
# 0000-01-01 to 9999-12-31, in days since 1970.
_FIRST_DAY, _LAST_DAY = -719_528, 2_932_896


def suffix(path: Path) -> str:
    """The suffix that tells the format, ".csv" of "log.csv.gz"."""
    name = path.name
    for compression in delimited.COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix.lower()


def read_columns(
    path: Path, columns: Mapping[str, str], remedy: str, separator: str = "", multiline: bool = False
) -> Table:
    """Reads some columns of a table. Columns of text files are strings, with null for an empty field.

    Args:
      columns: from the names of the result's columns to their names in the file.
      remedy: what to do if a column is missing, for the error message.
      separator: what is between two fields of a text file; "" goes by its header, and the format by the file's name.
      multiline: whether a quoted field of a text file may hold line ends.

    Raises:
      UserError: the file is missing, empty or malformed, or lacks a column.
    """
    require_file(path)
    kind = suffix(path)
    if not separator and kind not in SUFFIXES:
        raise UserError(f"{path}: the name ends in none of {', '.join(SUFFIXES)}; convert or rename the file")
    if not separator and kind in PARQUET:
        return _read_parquet(path, columns, remedy)
    if not separator and kind == ".jsonl":
        return json_lines.read_columns(path, columns, remedy)
    return delimited.read_columns(path, columns, remedy, separator, "\t" if kind == ".tsv" else ",", multiline)


def column_names(path: Path, separator: str) -> list[str]:
    """The columns of a text file.

    Raises:
      UserError: the file is missing, empty or not UTF-8.
    """
    return delimited.column_names(require_file(path), separator)


def read_interactions(
    path: Path, columns: Mapping[str, str], remedy: str, separator: str = "", multiline: bool = False
) -> tuple[pl.DataFrame, Notes, str]:
    """Reads a log as `from_frame` takes it: `user` and `item` (strings), `timestamp` (Int64 or Float64), no nulls.

    Args: see `read_columns`; `columns` names user, item and timestamp.

    Other columns that `columns` names are kept as they are in the file, but for bytes, which become strings.

    Returns:
      The log; notes on what may be wrong with it; and what its times are in the file (see `times`).

    Raises:
      UserError: as `read_columns`; or a row lacks a user, an item or a time.
    """
    table = read_columns(path, columns, remedy, separator, multiline)
    users, user_notes = ids(table, "user")
    items, item_notes = ids(table, "item")
    timestamps, time_notes, kind = times(table, "timestamp")
    others = [decoded(table, name) for name in columns if name not in ("user", "item", "timestamp")]
    frame = table.frame.with_columns(*others, user=users, item=items, timestamp=timestamps)
    return frame, table.notes + user_notes + item_notes + time_notes, kind


def require_interactions(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The frame as it is.

    Raises:
      UserError: it has no rows.
    """
    if frame.is_empty():
        raise UserError(f"{path}: has no interactions; copy the file again from its source")
    return frame


def read_texts(
    path: Path, item: str, fields: Sequence[str], remedy: str, separator: str = "", multiline: bool = False
) -> tuple[dict[str, str], Notes]:
    """Reads the texts of items, by id.

    Args: see `read_columns`; `item` names the column of ids, `fields` the columns that make up a text, in this order.

    Returns:
      The texts, and notes on what may be wrong with the file.

    Raises:
      UserError: as `read_columns`; or a row lacks an id, or has the id of an earlier row.
    """
    texts = [f"text{i}" for i in range(len(fields))]
    columns = {"id": item, **dict(zip(texts, fields, strict=True))}
    table = read_columns(path, columns, remedy, separator, multiline)
    item_ids, notes = ids(table, "id")
    repeats = ~item_ids.is_first_distinct()
    if repeats.any():
        row = repeats.arg_max()
        raise UserError(f"{table.where(row)}: item {item_ids[row]} has an earlier row; keep one of the two")
    # There may be no texts, and a frame without columns has no rows.
    rows = table.frame.select("id", *texts).iter_rows()
    return {item: join_fields(row) for item, (_, *row) in zip(item_ids, rows, strict=True)}, table.notes + notes


def _read_parquet(path: Path, columns: Mapping[str, str], remedy: str) -> Table:
    """Reads with PyArrow: polars panics on some damaged files, with pages on stderr."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            places = find(names, columns, str(path), remedy)
            read = file.read(list(dict.fromkeys(names[i] for i in places.values())))
            num_rows = file.metadata.num_rows
        if len(read) != num_rows:
            raise UserError(f"{path}: {len(read)} rows can be read of {num_rows}; copy it again from its source")
        read.validate(full=True)  # that strings are UTF-8, for one
        # Column by column, because polars panics on damaged metadata of a schema.
        frame = pl.DataFrame({ours: _to_polars(read[names[i]], names[i], path) for ours, i in places.items()})
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file ({first_line(error)}); copy it again from its source") from error
    return Table(frame, {ours: names[i] for ours, i in places.items()}, path, lambda row: f"row {row + 1}")


def _to_polars(column: pa.ChunkedArray, name: str, path: Path) -> pl.Series:
    """Converts a column. Times with a zone become UTC. Polars panics on what is refused here."""
    if pa.types.is_decimal256(column.type):
        raise UserError(f"{path}: column {name!r} is of type {column.type}; write it as integers or strings")
    if pa.types.is_timestamp(column.type) and column.type.tz:
        column = column.cast(pa.timestamp(column.type.unit))  # polars does not know every zone
    try:
        values = pl.from_arrow(column)
    except pl.exceptions.PanicException as error:
        raise UserError(f"{path}: column {name!r} is of type {column.type}; write it as strings") from error
    if values.dtype in (pl.Date, pl.Datetime):
        per_day = 1 if values.dtype == pl.Date else 86_400 * UNITS[values.dtype.time_unit]
        days = values.to_physical().cast(pl.Int64) // per_day
        wrong = (days < _FIRST_DAY) | (days > _LAST_DAY)
        if wrong.any():
            raise UserError(
                f"{path}:row {wrong.arg_max() + 1}: {name} is a date beyond the years 0 to 9999; correct the row"
            )
    return values
