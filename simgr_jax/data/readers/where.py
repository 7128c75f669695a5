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
            value = int(value) if value.lstrip("+-").isdecimal() and len(value) <= 18 else float(value)
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
      UserError: a value that is compared with a number is none, or no row is left.
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
    if isinstance(condition.value, str):
        column = column.cast(pl.String)
    elif not column.dtype.is_numeric():
        column = _numbers(column, condition, path)
    if column.dtype.is_float():
        column = column.fill_nan(None)  # pandas' missing value
    # As an expression: a comparison of a Series of integers would cut off the number's decimals.
    compared = _OPERATORS[condition.operator](pl.col(column.name), pl.lit(condition.value))
    return column.to_frame().select(compared.fill_null(condition.operator == "!=")).to_series()


def _numbers(column: pl.Series, condition: Condition, path: Path) -> pl.Series:
    if column.dtype == pl.Boolean:
        return column.cast(pl.Int8)
    numbers = column.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    bad = numbers.is_null() & column.is_not_null()
    if bad.any():
        raise UserError(
            f"{path}: {condition.column} {column[bad.arg_max()]!r:.40} is not a number; correct the row, or compare "
            f'with a quoted value in {KEY}: {condition.column} {condition.operator} "{condition.value}"'
        )
    return numbers
