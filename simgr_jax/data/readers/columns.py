"""The wanted columns of a file: found by name, and kept with the place of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl

from simgr_jax.errors import UserError

Notes = tuple[str, ...]  # See `Dataset.notes`.


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a file.

    Attributes:
      frame: one row per row of the file; blank lines are left out.
      names: from the frame's columns to their names in the file.
      path: the file.
      place: where row i of the frame is in the file, e.g. "3" (a line) or "row 3".
      notes: on what may be wrong with the file.
    """

    frame: pl.DataFrame
    names: dict[str, str]
    path: Path
    place: Callable[[int], str]
    notes: Notes = ()

    def where(self, row: int) -> str:
        return f"{self.path}:{self.place(row)}"


def matches(names: Sequence[str], wanted: str) -> list[int]:
    """The places of the columns of that very name; if there is none, of those that differ by case or outer blanks."""
    exact = [i for i, name in enumerate(names) if name == wanted]
    return exact or [i for i, name in enumerate(names) if name.strip().casefold() == wanted.strip().casefold()]


def find(names: Sequence[str], columns: Mapping[str, str], where: str, remedy: str) -> dict[str, int]:
    """The place of each column among `names`, by its name in `columns`.

    Args:
      names: the file's columns.
      columns: from our names to those in the file.
      where, remedy: of the error message.

    Raises:
      UserError: a column is missing, or there are two of its name.
    """
    places = {}
    for ours, name in columns.items():
        found = matches(names, name)
        if not found:
            raise UserError(f"{where}: no column {name!r} (it has {', '.join(names):.500}); {remedy}")
        if len(found) > 1:
            raise UserError(f"{where}: {len(found)} columns are called {name!r}; rename the others")
        places[ours] = found[0]
    return places
