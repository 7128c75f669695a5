"""MiniOneRec files: `train/*.csv`, `valid/*.csv` and `test/*.csv`, a row an interaction that is to be predicted
(`user_id`, `history_item_id`, `item_id`, and columns that repeat the other files), each part in order of time; and
`*.item.json` and `*.index.json`, here or in `index/`, as LC-Rec has them.

A user's rows go on from one part to the next. `history_item_id` is all of the user's items before, cut to the last 10.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
from pathlib import Path

import numpy as np

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.readers.catalog import read_catalog
from simgr_jax.errors import UserError
from simgr_jax.files import find_file, read_text, require_folder

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
    """Joins a user's rows to one sequence: the first row's history, then each row's item.

    `Dataset.parts` says which file an interaction's row is in. The items of a first row's history have no row: nobody
    is asked to predict them, so they count as train.

    Raises:
      UserError: a file is missing, not UTF-8 or not of this form, a row's history is not what the user's rows before
        say, an item is not in the catalog, or has no semantic ID in `*.index.json`.
    """
    rows = [row for part, path in enumerate(files(folder)[: len(PARTS)]) for row in _rows(path, part)]
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
                f"{row.where}: the history is not the items of user {row.user} in the rows before; "
                "leave the rows of the train, valid and test files complete and in order of time"
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
        parts=np.concatenate([np.array(labels, dtype=np.uint8) for labels in parts.values()]),
    )


def _item_files(folder: Path) -> tuple[Path | None, Path | None]:
    return tuple(find_file(folder, f"*.{kind}.json", f"index/*.{kind}.json") for kind in ("item", "index"))


def _rows(path: Path, part: int) -> list[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    missing = set(COLUMNS) - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path}:1: no column {', '.join(sorted(missing))}; check the file's format")
    rows = []
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            user, history, item = (fields[column] for column in COLUMNS)
            if not user or not item:
                raise UserError(f"{where}: a row without user_id or item_id; complete or remove it")
            rows.append(Row(part, where, user, _parse_history(history, where), item))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not CSV ({error}); correct the line") from error
    if not rows:
        raise UserError(f"{path}: has no rows; copy the file again from its source")
    return rows


def _parse_history(text: str | None, where: str) -> list[str]:
    try:
        history = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        history = None
    if not isinstance(history, list) or not all(type(item) in (int, str) for item in history):
        raise UserError(f"{where}: history_item_id {text!r:.60} is not a list of items; write e.g. [3, 14, 15]")
    return [str(item) for item in history]
