"""Makes strings of ids, and seconds (or the file's own unit) of times."""

from __future__ import annotations

import polars as pl

from simgr_jax.data.readers.columns import Notes, Table
from simgr_jax.errors import UserError

# Floats hold every integer up to this, by their type.
_EXACT = {pl.Float16: 2**11, pl.Float32: 2**24, pl.Float64: 2**53}
UNITS = {"ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
_INT64_END = 2.0**63
# An ISO 8601 date, or date and time, with or without zone.
_ISO = (
    r"^(?P<date>\d{4}-\d{2}-\d{2})(?:[T ](?P<minute>\d{2}:\d{2})(?::(?P<second>\d{2})(?P<fraction>\.\d+)?)?"
    r" ?(?P<zone>Z|z|UTC|(?P<sign>[+-])(?P<zone_hours>[01]\d|2[0-3]):?(?P<zone_minutes>[0-5]\d)?)?)?$"
)


def ids(table: Table, column: str) -> tuple[pl.Series, Notes]:
    """A column of ids as strings. Integers that pandas turned into floats become integers again.

    Returns:
      The ids, and a note if two of them differ by blanks alone.

    Raises:
      UserError: a row has no id, or one that is not text or an integer.
    """
    name = table.names[column]
    values = decoded(table, column)
    if values.dtype.is_float():
        values = values.fill_nan(None).cast(pl.Float64)
        # Beyond the integers that the type holds, different ids may have become one.
        wrong = (values != values.round()) | (values.abs() > _EXACT[table.frame[column].dtype])
        if wrong.any():
            row = wrong.arg_max()
            raise UserError(
                f"{table.where(row)}: {name} {values[row]} is a floating-point number; "
                "write ids as integers or as strings"
            )
        values = values.cast(pl.Int64)
    elif values.dtype.is_decimal():
        values = values.cast(pl.String).str.replace(r"\.0*$", "")
    values = values.cast(pl.String)
    trimmed = values.str.strip_chars()
    has_blanks = (values.str.len_bytes() != trimmed.str.len_bytes()).any()
    missing = trimmed.is_null() | (trimmed == "")
    if missing.any():
        raise _no_value(table, missing.arg_max(), name)
    return values, _blanks_note(table, name, values.unique()) if has_blanks else ()


def times(table: Table, column: str) -> tuple[pl.Series, Notes, str]:
    """A column of times as Int64 or Float64: numbers as they are, dates and times as seconds since 1970 (UTC).

    Returns:
      The times; a note if they are rounded; and what they were, "numbers" or "dates", or "" if there are none.

    Raises:
      UserError: a row has no time, or one that is not a number or an ISO date, or beyond 64-bit integers.
    """
    name, written = table.names[column], decoded(table, column)
    kind, expected, are_dates = written.dtype, "a number", False
    distinct = written  # equal where the times are
    if kind == pl.String:
        written = written.str.strip_chars()
        values = _numbers(written)
        if values.null_count() > written.null_count():
            seconds, exact = _iso_seconds(written)
            if seconds.null_count() < values.null_count():
                values, distinct, are_dates = seconds, exact, True
                expected = "an ISO date or time like the others"
        if values.dtype == pl.Float64 and not are_dates:  # 7.50 is 7.5
            distinct = written.str.replace(r"^[+]?(-?\d+\.\d*?)0*$", "$1").str.strip_suffix(".")
    elif kind == pl.Date:
        values, are_dates = written.to_physical().cast(pl.Int64) * 86_400, True
    elif kind == pl.Datetime:
        values, are_dates = written.to_physical() / UNITS[kind.time_unit], True
    elif kind.is_numeric() or kind == pl.Null:
        values = _numbers(written)
    else:
        raise UserError(f"{table.path}: column {name!r} is of type {kind}; give the seconds since 1970, or dates")
    bad = values.is_null()
    if bad.any():
        row = bad.arg_max()
        if written[row] is None:
            raise _no_value(table, row, name)
        raise UserError(
            f"{table.where(row)}: {name} {written[row]!r:.40} is not {expected}; "
            "give the seconds since 1970, or ISO dates, in every row"
        )
    notes = _rounding_note(table, name, values, distinct, kind) if values.dtype == pl.Float64 else ()
    return values, notes, ("dates" if are_dates else "numbers") if len(values) else ""


def decoded(table: Table, column: str) -> pl.Series:
    """A column, as strings if it holds bytes or categories.

    Raises:
      UserError: it holds lists or records, or bytes that are not UTF-8.
    """
    values, name = table.frame[column], table.names[column]
    if values.dtype.is_nested():
        raise UserError(f"{table.path}: column {name!r} holds lists or records; name a column of plain values")
    if values.dtype == pl.Binary:
        try:
            return values.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            raise UserError(
                f"{table.path}: column {name!r} holds bytes that are not UTF-8 text; write it as strings"
            ) from error
    return values.cast(pl.String) if values.dtype in (pl.Categorical, pl.Enum) else values


def _numbers(column: pl.Series) -> pl.Series:
    """Int64 if all values are integers, else Float64 with null for values that are not finite numbers."""
    exact = not column.dtype.is_float() and not (column.dtype.is_decimal() and column.dtype.scale)
    integers = column.cast(pl.Int64, strict=False) if exact else None
    if integers is not None and integers.null_count() == column.null_count():
        return integers
    numbers = column.cast(pl.Float64, strict=False)
    return numbers.set(~numbers.is_finite(), None)


def _iso_seconds(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Seconds since 1970 of ISO dates and times; null for other strings. Without a zone they are UTC.

    Returns:
      The seconds, and the pairs of whole seconds and fraction, which no rounding makes equal.
    """
    parts = column.str.extract_groups(_ISO).struct.unnest()
    text = pl.concat_str(
        "date", pl.lit(" "), pl.col("minute").fill_null("00:00"), pl.lit(":"), pl.col("second").fill_null("00")
    )
    local = text.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False).dt.epoch("s")
    zone = pl.col("zone_hours").cast(pl.Int64) * 3600 + pl.col("zone_minutes").cast(pl.Int64).fill_null(0) * 60
    zone = pl.when(pl.col("sign") == "-").then(-zone).otherwise(zone).fill_null(0)
    fraction = pl.col("fraction").cast(pl.Float64).fill_null(0.0)
    seconds = parts.select(seconds=local - zone, fraction=fraction)
    if not (seconds["fraction"] > 0).any():
        return seconds["seconds"], seconds["seconds"]
    return seconds["seconds"] + seconds["fraction"], seconds.to_struct()


def _rounding_note(table: Table, name: str, values: pl.Series, distinct: pl.Series, kind: pl.DataType) -> Notes:
    """Notes floats that were rounded: by the conversion from `distinct`, or, as it seems, before they were written.

    Raises:
      UserError: one is beyond int64.
    """
    size = values.abs()
    row, exact = size.arg_max(), _EXACT.get(kind, 2**53)
    if row is None:
        return ()
    if size[row] >= _INT64_END:
        raise UserError(
            f"{table.where(row)}: {name} {values[row]:g} is beyond 64-bit integers; give the seconds since 1970"
        )
    if size[row] >= exact:
        what = f"holds floating-point numbers of {exact:,} and more, which are rounded"
    elif exact < 2**53 and (values != values.round()).any():
        what = f"holds fractions as {kind}, which are rounded"
    elif distinct.n_unique() > values.n_unique():
        what = "holds different times that are equal as 64-bit floating-point numbers"
    else:
        return ()
    return (
        f"column {name!r} of {table.path} {what}, so interactions may have lost their order; "
        "write the times as integers",
    )


def _blanks_note(table: Table, name: str, values: pl.Series) -> Notes:
    spellings = pl.DataFrame({"id": values, "trimmed": values.str.strip_chars()}).filter(
        pl.col("trimmed").is_duplicated() & (pl.col("trimmed") != "")
    )
    if spellings.is_empty():
        return ()
    first, second = spellings.filter(pl.col("trimmed") == spellings["trimmed"].min())["id"].sort()[:2]
    return (
        f"column {name!r} of {table.path} has ids that differ by blanks alone and count as different, like {first!r} "
        f"and {second!r}; remove the blanks if they are the same",
    )


def _no_value(table: Table, row: int, name: str) -> UserError:
    return UserError(f"{table.where(row)}: no {name}; complete or remove the row")
