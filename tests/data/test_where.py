"""`config.data.log.where`: which rows of a log count."""

import contextlib
import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.readers import where
from simgr_jax.data.readers.where import Condition
from simgr_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("", []),
        ('event = "purchase"', [Condition("event", "=", "purchase")]),
        ("rating >= 4", [Condition("rating", ">=", 4)]),
        ("rating>=-4.5e-1", [Condition("rating", ">=", -0.45)]),
        (" rating:float == .5 ", [Condition("rating:float", "==", 0.5)]),
        ('"event type" != \'it is "x"\'', [Condition("event type", "!=", 'it is "x"')]),
        (
            'Größe < 3 AND event="a and b = 1" and x_2 <= 10',
            [Condition("Größe", "<", 3), Condition("event", "=", "a and b = 1"), Condition("x_2", "<=", 10)],
        ),
    ],
)
def test_conditions_are_read(text, conditions):
    assert where.parse(text) == conditions


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "event",
        "event = purchase",
        'event = "purchase',
        "rating => 4",
        "rating >= 4 or rating = 1",
        "rating >= 4 and",
        "and rating >= 4",
        "rating >= 4 x = 1",
        "time >= 2020-01-01",
        "rating >= 4; DROP TABLE log",
        "__import__('os') = 1",
        '(event = "a")',
    ],
)
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^config\.data\.log\.where: can't read .*; write conditions like") as caught:
        where.parse(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_text_is_more_than_refused(text):
    with contextlib.suppress(UserError):
        where.parse(text)


def kept(text, **columns):
    """The numbers of the rows that are kept."""
    conditions = where.parse(text)
    frame = pl.DataFrame(columns)
    read = {ours: frame[name] for ours, name in where.columns(conditions).items()}
    rows, notes = where.keep(pl.DataFrame({"row": range(len(frame)), **read}), conditions, Path("log.csv"), text)
    left_out = len(frame) - len(rows)
    assert notes == (f"config.data.log.where leaves out {left_out} of {len(frame)} rows",)
    return rows["row"].to_list()


@pytest.mark.parametrize(
    ("text", "values", "rows"),
    [
        # A CSV file's columns are strings. Empty fields are null.
        ('x = "purchase"', ["purchase", "view", None, "Purchase"], [0]),
        ('x != "view"', ["purchase", "view", None, "Purchase"], [0, 2, 3]),
        ("x >= 4", ["4", "3.99", "10", " 5 ", None], [0, 2, 3]),
        ("x = 4", ["4.0", "4", "04", "5"], [0, 1, 2]),
        ('x = "4"', ["4.0", "4", "04", "5"], [1]),
        ('x >= "2020-02"', ["2020-01-31", "2020-02-01", "2021-01-01"], [1, 2]),
        ("x = 9007199254740993", ["9007199254740992", "9007199254740993", "9007199254740993.5", None], [1]),
        ("x > 1700000000000000000", [" 1700000000000000001 ", "1700000000000000000", "1.8e18"], [0, 2]),
        ("x != 9007199254740993", ["9007199254740992", "9007199254740993", None, "7.5"], [0, 2, 3]),
        ("x >= 1", ["nan", "inf", "1.0"], [1, 2]),
        # A Parquet file's have types.
        ("x = 1700000000000000001", [1_700_000_000_000_000_001, 1_700_000_000_000_000_000], [0]),
        ("x >= 4.5", [4, 5, 6], [1, 2]),
        ("x != 4", [4, 5, None], [1, 2]),
        ("x > -1", pl.Series([0, 200], dtype=pl.UInt8), [0, 1]),
        ("x >= 4.1", pl.Series([4.1, 4.0], dtype=pl.Float32), [0]),
        ("x >= 4", [float("nan"), 4.0, float("inf")], [1, 2]),
        ("x = 1", [True, False, None], [0]),
        ('x = "true"', [True, False, None], [0]),
        ('x < "2020-06-01"', [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)], [0]),
        ('x = "b"', pl.Series(["a", "b"], dtype=pl.Categorical), [1]),
    ],
)
def test_rows_are_kept_for_which_the_condition_holds(text, values, rows):
    assert kept(text, x=values) == rows


def test_all_conditions_have_to_hold():
    assert kept("x >= 2 and x < 4 and y = 'a'", x=[1, 2, 3, 4], y=["a", "a", "b", "a"]) == [1]


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("x >= 4", ["4", "good"], "log.csv: x 'good' is not a number; correct the row, or compare with a quoted value"),
        ("x >= 4", [datetime.timedelta(1)], "log.csv: column 'x' is of type Duration(time_unit='us'); write it as num"),
        (
            "x = '4'",
            [datetime.timedelta(1)],
            "log.csv: column 'x' is of type Duration(time_unit='us'); write it as num",
        ),
        ("x >= 4", [3, 2], "config.data.log.where: x >= 4 holds for no row of log.csv; change it, or leave it out"),
    ],
)
def test_a_condition_that_does_not_fit_the_column_is_refused(text, values, message):
    with pytest.raises(UserError) as caught:
        kept(text, x=values)
    assert message in str(caught.value)
