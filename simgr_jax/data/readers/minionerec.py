"""Reads MiniOneRec files: `train/*.csv`, `valid/*.csv` and `test/*.csv`, and optionally LC-Rec's `*.item.json` and
`*.index.json`, here or in `index/`.

Each table has one row per interaction to predict, in time order, with the columns `user_id`, `history_item_id` and
`item_id`. Its other columns repeat the other files. A user's rows continue from one table to the next.
`history_item_id` holds the user's earlier items, cut to the last 10. Titles hold line ends, so a row may take several
lines. A note says how many do, because a stray quotation mark would take in rows.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from pathlib import Path

import numpy as np

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.readers import delimited
from simgr_jax.data.readers.catalog import read_catalog
from simgr_jax.data.readers.columns import Notes
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import find_file, is_text, require_file, require_folder

PARTS = ("train", "valid", "test")
COLUMNS = ("user_id", "history_item_id", "item_id")


@dataclasses.dataclass(frozen=True)
class Row:
    part: int  # as in Dataset.parts
    where: str  # FILE:LINE
    user: str
    history: list[str]
    item: str


def files(folder: Path) -> list[Path]:
    require_folder(folder)
    tables = [find_file(folder, f"{part}/*.csv", required=True) for part in PARTS]
    return [*tables, *(path for path in _item_files(folder) if path)]


def read(folder: Path, name: str) -> Dataset:
    """Joins each user's rows into one sequence: the first row's history, then the item of every row.

    `Dataset.parts` tells which table an interaction is from. The items of a first row's history have no row of their
    own, so they count as train.

    Raises:
      UserError: a file is missing, not UTF-8 or malformed; a row's history contradicts the user's earlier rows; or an
        item is not in the catalog, or has no semantic ID in `*.index.json`.
    """
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of "\\d" and the like in a history
        tables = [_rows(path, part) for part, path in enumerate(files(folder)[: len(PARTS)])]
    rows, notes = [row for table, _ in tables for row in table], sum((notes for _, notes in tables), ())
    cut = max((len(row.history) for row in rows), default=0)
    seen = (item for row in rows for item in [*row.history, row.item])
    catalog = read_catalog(*_item_files(folder), seen)
    sequences: dict[str, list[str]] = {}
    indices: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for row in rows:
        if row.user not in sequences:
            sequences[row.user] = list(row.history)
            indices[row.user] = catalog.indices(row.history, row.where)
            parts[row.user] = [0] * len(row.history)
        if row.history != sequences[row.user][-cut:]:
            raise UserError(
                f"{row.where}: the history does not match the earlier rows of user {row.user}; "
                "keep all rows of the train, valid and test files, in time order"
            )
        sequences[row.user].append(row.item)
        indices[row.user] += catalog.indices([row.item], row.where)
        parts[row.user].append(row.part)
    return Dataset(
        name=name,
        user_ids=list(indices),
        item_ids=catalog.item_ids,
        sequences=Sequences.from_lists(indices.values()),
        item_texts=catalog.item_texts,
        codes=catalog.codes,
        codebook_sizes=catalog.codebook_sizes,
        notes=notes,
        parts=np.concatenate([np.array(labels, dtype=np.uint8) for labels in parts.values()]),
    )


def _item_files(folder: Path) -> tuple[Path | None, Path | None]:
    return tuple(find_file(folder, f"*.{kind}.json", f"index/*.{kind}.json") for kind in ("item", "index"))


def _rows(path: Path, part: int) -> tuple[list[Row], Notes]:
    rows, several = [], []
    for line, (user, history, item), takes_several in delimited.read_rows(
        require_file(path), COLUMNS, "check the file's format"
    ):
        where = f"{path}:{line}"
        if not user or not item:
            raise UserError(f"{where}: a row without user_id or item_id; complete or remove it")
        several += [line] * takes_several
        rows.append(Row(part, where, user, _parse_history(history, where), item))
    if not rows:
        raise UserError(f"{path}: has no rows; copy the file again from its source")
    return rows, delimited.several_lines_note(path, several, len(rows))


def _parse_history(text: str, where: str) -> list[str]:
    try:
        history = ast.literal_eval(text)
        if isinstance(history, list) and all(type(item) in (int, str) for item in history):
            items = [str(item) for item in history]
            if all(map(is_text, items)):
                return items
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise UserError(f"{where}: history_item_id {text!r:.60} is not a list of items; write e.g. [3, 14, 15]")
