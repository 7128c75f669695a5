"""Conditions on the rows of a log, like `event = "purchase" and rating >= 4`."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from simgr_jax.errors import UserError

KEY = "config.data.log.where"
_OPERATORS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(
    r"""\s* (?: (?P<column>[^\W\d][\w.:-]*) | "(?P<quoted_column>[^"]+)" )
    \s* (?P<operator>[=!]=|[<>]=?|=)
    \s* (?: "(?P<text>[^"]*)" | '(?P<other_text>[^']*)' | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?![\w.]) )
    \s*""",
    re.VERBOSE | re.IGNORECASE,
)
_AND = re.compile(r"and\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a row's column has to be.

    Attributes:
      column: its name in the file.
      operator: a key of `_OPERATORS`.
      value: a string, which is compared with the column as text, or a number.
    """

    column: str
    operator: str
    value: str | int | float


def parse(text: str) -> list[Condition]:
    """Conditions `COLUMN OPERATOR VALUE` that are joined by `and`; none if the text is empty.

    A text value is quoted, and so is a column's name if it is not one word. The operators are = (or ==), !=, <, <=, >
    and >=.

    Raises:
      UserError: the text is something else.
    """
    conditions, place = [], 0
    while place < len(text):
        joint = _AND.match(text, place) if conditions else None
        found = _CONDITION.match(text, joint.end() if joint else place)
        if not found or (conditions and not joint):
            raise UserError(
                f"{KEY}: can't read {text[place:]!r:.60}; write conditions like 'event = \"purchase\" and rating >= 4'"
            )
        value = next(found[group] for group in ("text", "other_text", "number") if found[group] is not None)
        if found["number"]:
            is_integer = value.lstrip("+-").isdecimal() and len(value) <= 20 and abs(int(value)) < 2**63
            value = int(value) if is_integer else float(value)
        conditions.append(Condition(found["column"] or found["quoted_column"], found["operator"], value))
        place = found.end()
    return conditions


def columns(conditions: Sequence[Condition]) -> dict[str, str]:
    """The columns that `keep` reads: from their names in its frame to their names in the file."""
    return {_name(condition): condition.column for condition in conditions}


def keep(
    frame: pl.DataFrame, conditions: Sequence[Condition], path: Path, where: str
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The rows for which all conditions hold, and notes (see `Dataset.notes`) on how many are left out.

    A row without the value fulfils only !=.

    Args:
      frame: has `columns(conditions)`.
      path: the file, for messages.
      where: the conditions' text, for messages.

    Raises:
      UserError: a value that is compared with a number is none, a column can't be compared, or no row is left.
    """
    if not conditions:
        return frame, ()
    kept = frame.filter(*(_holds(frame[_name(condition)], condition, path) for condition in conditions))
    if kept.is_empty():
        raise UserError(f"{KEY}: {where} holds for no row of {path}; change it, or leave it out")
    return kept, (f"{KEY} leaves out {len(frame) - len(kept):,} of {len(frame):,} rows",)


def _name(condition: Condition) -> str:
    return f"where {condition.column}"


def _holds(column: pl.Series, condition: Condition, path: Path) -> pl.Series:
    columns = [column]
    if isinstance(condition.value, str):
        columns = [_strings(column, condition, path)]
    elif not column.dtype.is_numeric():
        columns = _numbers(column, condition, path)
    # As an expression: a comparison of a Series of integers would cut off the number's decimals.
    compare, value = _OPERATORS[condition.operator], pl.lit(condition.value)
    columns = [each.fill_nan(None) if each.dtype.is_float() else each for each in columns]  # pandas' missing value
    return pl.select(pl.coalesce(*(compare(pl.lit(each), value) for each in columns), condition.operator == "!="))[:, 0]


def _strings(column: pl.Series, condition: Condition, path: Path) -> pl.Series:
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path}: column {condition.column!r} is of type {column.dtype}; write it as numbers or strings"
        ) from error


def _numbers(column: pl.Series, condition: Condition, path: Path) -> list[pl.Series]:
    """The integers, and all numbers as floats, which do not tell large integers apart."""
    if column.dtype == pl.Boolean:
        return [column.cast(pl.Int8)]
    text = _strings(column, condition, path).str.strip_chars()
    integers, numbers = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
    bad = numbers.is_null() & column.is_not_null()
    if bad.any():
        raise UserError(
            f"{path}: {condition.column} {column[bad.arg_max()]!r:.40} is not a number; correct the row, or compare "
            f'with a quoted value in {KEY}: {condition.column} {condition.operator} "{condition.value}"'
        )
    return [integers, numbers]
