"""Reads RecBole's atomic files: `*.inter` and optionally `*.item`. They are tab-separated tables whose header gives
each column a type, e.g. `user_id:token  item_id:token  rating:float  timestamp:float`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from simgr_jax.data.dataset import Dataset
from simgr_jax.data.interactions import from_frame
from simgr_jax.data.readers.columns import Notes, matches
from simgr_jax.data.readers.tables import column_names, read_interactions, read_texts, require_interactions
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import find_file, require_folder

# The names that RecBole's published files give to these columns, the usual one first.
NAMES = {
    "user": ("user_id", "session_id"),
    "item": ("item_id", "product_id", "business_id", "venue_id", "artist_id"),
    "timestamp": ("timestamp", "time", "date", "datetime"),
}
TEXT_TYPES = ("token", "token_seq")
_SEPARATOR = "\t"


def files(folder: Path) -> list[Path]:
    require_folder(folder)
    inter, item = find_file(folder, "*.inter", required=True), find_file(folder, "*.item")
    return [inter, item] if item else [inter]


def read(folder: Path, name: str, k_core: int = 0, *, user: str = "", item: str = "", timestamp: str = "") -> Dataset:
    """Reads the interactions (see `from_frame`).

    An item's text joins its token and token_seq columns in file order. Items that `*.item`
    lacks, as in some published files, have an empty text.

    Args:
      user, item, timestamp: the columns, with or without their type; "" looks for one of NAMES, or, for items, the
        first column of `*.item`. The items' column has the same name in both files.

    Raises:
      UserError: a file is missing, not UTF-8 or malformed; a column can't be told; a timestamp is not a number or a
        date; an item has two rows in `*.item`; or nothing is left after k-core filtering.
    """
    inter, *items = files(folder)
    names, wanted = column_names(inter, _SEPARATOR), {"user": user, "item": item, "timestamp": timestamp}
    usual = NAMES | {"item": [*NAMES["item"], *(name for path in items for name in column_names(path, _SEPARATOR)[:1])]}
    columns = {ours: _column(inter, names, ours, [name] if name else usual[ours]) for ours, name in wanted.items()}
    frame, notes, _ = read_interactions(inter, columns, "name the columns and their types as RecBole does", _SEPARATOR)
    frame = require_interactions(frame, inter)
    texts, text_notes = _read_texts(items[0], columns["item"]) if items else (None, ())
    dataset = from_frame(frame, name, k_core, texts)
    return dataclasses.replace(dataset, notes=notes + text_notes + dataset.notes)


def _read_texts(path: Path, item: str) -> tuple[dict[str, str], Notes]:
    names = column_names(path, _SEPARATOR)
    item = _column(path, names, "item", [_bare(item)])
    fields = [name for name in names if name.rpartition(":")[2].strip() in TEXT_TYPES and name != item]
    return read_texts(path, item, fields, "name the columns and their types as RecBole does", _SEPARATOR)


def _bare(name: str) -> str:
    """A column's name without its type."""
    return name.rpartition(":")[0] or name


def _column(path: Path, names: Sequence[str], ours: str, wanted: Sequence[str]) -> str:
    """The first of the wanted columns that the file has, by its full name or without its type.

    Raises:
      UserError: it has none of them, or two of one name.
    """
    for name in wanted:
        found = matches(names, name) or matches([_bare(each) for each in names], name)
        if len(found) > 1:
            raise UserError(f"{path}:1: {len(found)} columns are called {name!r}; rename the others")
        if found:
            return names[found[0]]
    raise UserError(
        f"{path}:1: no column {' or '.join(wanted)} (it has {', '.join(names):.500}); "
        f"set config.data.recbole.{ours} to the {ours}'s column"
    )
