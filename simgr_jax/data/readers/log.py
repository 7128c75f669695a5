"""Reads a plain log: a CSV, TSV or Parquet table with one row per interaction, and optionally a file of items."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simgr_jax.data.dataset import Dataset
from simgr_jax.data.interactions import from_frame
from simgr_jax.data.item_text import join_fields
from simgr_jax.data.readers import where as where_rows
from simgr_jax.data.readers.tables import read_columns, read_interactions
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import read_text, require_file


def files(path: Path, items_file: str = "") -> list[Path]:
    log = require_file(path, "set config.data.path to the log, a CSV, TSV or Parquet file")
    if not items_file:
        return [log]
    return [log, require_file(Path(os.path.expanduser(items_file)), "check config.data.log.items_file")]


def read(
    path: Path,
    name: str,
    k_core: int = 0,
    *,
    user: str,
    item: str,
    timestamp: str,
    items_file: str = "",
    items_id: str = "",
    items_text: Sequence[str] = (),
    keep_cold_items: bool = False,
    where: str = "",
) -> Dataset:
    """Reads a log (see `from_frame`). Timestamps keep the log's unit; dates in a Parquet file become seconds.

    Args:
      user, item, timestamp: the names of the log's columns.
      items_file: CSV, TSV, Parquet or JSONL file with one row per item; "" for none.
      items_id: its column (JSONL: key) of item ids, spelled as in the log.
      items_text: its columns (JSONL: keys) that make up an item's text, in this order.
      keep_cold_items: whether the catalog also holds the items of `items_file` that no interaction is left of.
      where: which rows of the log count (see `where.parse`); "" for all.

    Raises:
      UserError: a file is missing, not UTF-8 or malformed, or lacks a column or a value; a timestamp is not a number;
        an item has no row or two rows in the items file; `where` is malformed; or nothing is left after filtering.
    """
    conditions = where_rows.parse(where)
    _, *items = files(path, items_file)
    columns = {"user": user, "item": item, "timestamp": timestamp, **where_rows.columns(conditions)}
    frame = read_interactions(path, columns, "set config.data.log.user, .item and .timestamp to the log's columns")
    frame, notes = where_rows.keep(frame, conditions, path, where)
    texts = _read_texts(*items, items_id, items_text) if items else None
    dataset = from_frame(frame, name, k_core, texts, keep_cold_items)
    dataset = dataclasses.replace(dataset, notes=notes + dataset.notes)
    if texts is None:
        return dataset
    unknown = next((item for item in dataset.item_ids if item not in texts), None)
    if unknown is not None:
        raise UserError(f"{items_file}: no row for item {unknown} of {path}; add it, or remove the item from the log")
    return dataset


def _read_texts(path: Path, items_id: str, items_text: Sequence[str]) -> dict[str, str]:
    if not items_text:
        raise UserError("config.data.log.items_text: is empty; name the columns that make up an item's text")
    rows = _json_rows(path, items_id) if path.suffix == ".jsonl" else _table_rows(path, items_id, items_text)
    texts = {}
    for where, row in rows:
        item = row.get(items_id)
        if item is None:
            raise UserError(f"{where}: no {items_id!r}; add it, or set config.data.log.items_id to the id's name")
        if str(item) in texts:
            raise UserError(f"{where}: item {item} has an earlier row; keep one of the two")
        texts[str(item)] = join_fields(row.get(name) for name in items_text)
    return texts


def _table_rows(path: Path, items_id: str, items_text: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    remedy = "set config.data.log.items_id and .items_text to the file's columns"
    table = read_columns(path, {name: name for name in (items_id, *items_text)}, remedy)
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        if any(value is not None for value in row.values()):  # polars reads a blank line as a row
            yield f"{path}: row {number}", row


def _json_rows(path: Path, items_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); correct or remove the line") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}:{number}: not an object; write e.g. {{"{items_id}": "...", "title": "..."}}')
        yield f"{path}:{number}", row
