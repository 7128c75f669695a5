"""Reads a plain log, one row per interaction, and optionally a file of items: CSV, TSV, JSON Lines or Parquet."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from simgr_jax.data.dataset import Dataset
from simgr_jax.data.interactions import from_frame
from simgr_jax.data.item_text import join_fields
from simgr_jax.data.readers import json_lines
from simgr_jax.data.readers import where as where_rows
from simgr_jax.data.readers.columns import Notes, matches
from simgr_jax.data.readers.tables import PARQUET, read_interactions, read_texts, require_interactions, suffix
from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import require_file

_KINDS = "a CSV, TSV, JSON Lines or Parquet file, or a folder of Parquet files"


def files(path: Path, items_file: str = "") -> list[Path]:
    return [*_parts(path), *_items(items_file)]


def read(
    path: Path,
    name: str,
    k_core: int = 0,
    *,
    user: str,
    item: str,
    timestamp: str,
    separator: str = "",
    multiline: bool = False,
    items_file: str = "",
    items_id: str = "",
    items_text: Sequence[str] = (),
    keep_cold_items: bool = False,
    where: str = "",
) -> Dataset:
    """Reads a log (see `from_frame`). Timestamps keep the log's unit; dates, also as ISO strings, become seconds.

    Args:
      path: the file, which may be compressed (.gz, .zst), or a folder of Parquet files.
      user, item, timestamp: the names of the log's columns (JSON Lines: keys).
      separator: what is between two fields of a CSV file; "" goes by its header.
      multiline: whether quoted fields of CSV files may hold line ends; if not, such a field is an error.
      items_file: a file with one row per item, of any of these formats; "" for none.
      items_id: its column (JSON Lines: key) of item ids, spelled as in the log.
      items_text: its columns (JSON Lines: keys) that make up an item's text, in this order.
      keep_cold_items: whether the catalog also holds the items of `items_file` that no interaction is left of.
      where: which rows of the log count (see `where.parse`); "" for all.

    Raises:
      UserError: a file is missing, not UTF-8 or malformed, or lacks a column or a value; a timestamp is not a number
        or a date; an item has no row or two rows in the items file; `where` is malformed; or nothing is left after
        filtering.
    """
    conditions = where_rows.parse(where)
    columns = {"user": user, "item": item, "timestamp": timestamp, **where_rows.columns(conditions)}
    remedy = "set config.data.log.user, .item and .timestamp to the log's columns"
    separator = _known_separator(separator, path)
    if multiline and not any(_is_delimited(file) and suffix(file) != ".tsv" for file in [path, *_items(items_file)]):
        raise UserError("config.data.log.multiline: is not read, because no file is a CSV file; leave it out")
    parts = _parts(path)
    read_part = partial(read_interactions, columns=columns, remedy=remedy, separator=separator, multiline=multiline)
    frames, notes, kinds = zip(*map(read_part, parts), strict=True)
    notes += (_check_parts(parts, frames, kinds, timestamp),)
    try:
        frame = require_interactions(pl.concat(frames, how="vertical_relaxed"), path)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: the parts' columns differ in type ({first_line(error)}); write them alike") from error
    frame, where_notes = where_rows.keep(frame, conditions, path, where)
    texts, text_notes = _read_texts(*_items(items_file), items_id, items_text, multiline) if items_file else (None, ())
    dataset = from_frame(frame, name, k_core, texts, keep_cold_items)
    dataset = dataclasses.replace(dataset, notes=sum(notes, ()) + text_notes + where_notes + dataset.notes)
    if texts is None:
        return dataset
    unknown = next((item for item in dataset.item_ids if item not in texts), None)
    if unknown is not None:
        near = _near(unknown, texts)
        hint = "" if near is None else f", but for {near!r}"
        remedy = "spell ids alike in both files" if hint else "add it, or remove the item from the log"
        raise UserError(f"{items_file}: no row for item {unknown} of {path}{hint}; {remedy}")
    return dataset


def _parts(path: Path) -> list[Path]:
    """The files of a log: the file itself, or those of a folder that Spark and others do not hide from readers."""
    if not path.is_dir():
        return [require_file(path, f"set config.data.path to the log, {_KINDS}")]
    found = sorted(part for part in path.rglob("*") if part.is_file())
    found = [part for part in found if not any(name[0] in "._" for name in part.relative_to(path).parts)]
    parts = [part for part in found if part.suffix.lower() in PARQUET]
    if not parts:
        raise UserError(f"{path}: is a folder without *.parquet files; set config.data.path to the log, {_KINDS}")
    if len(parts) < len(found):
        other = next(part for part in found if part not in parts)
        raise UserError(f"{other}: is no *.parquet file, in a folder of them; move it away, or rename it")
    return [require_file(part) for part in parts]


def _check_parts(parts: Sequence[Path], frames: Sequence[pl.DataFrame], kinds: Sequence[str], name: str) -> Notes:
    """Notes integers that become floats, because another part has floats.

    Args:
      kinds: what the times of each part are (see `read_interactions`).
      name: of the times' column.

    Raises:
      UserError: some parts have numbers, others dates.
    """
    firsts = {kind: part for part, kind in zip(parts, kinds, strict=True) if kind}
    if len(firsts) > 1:
        raise UserError(
            f"{firsts['dates']}: column {name!r} holds dates, but that of {firsts['numbers']} holds numbers; "
            "write the same kind of time in all parts"
        )
    times = [(part, frame["timestamp"]) for part, frame in zip(parts, frames, strict=True) if len(frame)]
    floats = next((part for part, values in times if values.dtype == pl.Float64), None)
    if floats is None:
        return ()
    for part, values in times:
        if values.dtype == pl.Int64 and max(values.max(), -values.min()) > 2**53:
            return (
                f"column {name!r} of {part} holds integers above {2**53:,}, which are rounded because {floats} holds "
                "floating-point numbers, so interactions may have lost their order; write the times as integers",
            )
    return ()


def _items(items_file: str) -> list[Path]:
    if not items_file:
        return []
    return [require_file(Path(os.path.expanduser(items_file)), "check config.data.log.items_file")]


def _is_delimited(path: Path) -> bool:
    return not path.is_dir() and suffix(path) not in (".jsonl", *PARQUET)


def _known_separator(separator: str, path: Path) -> str:
    key = "config.data.log.separator"
    if separator and not _is_delimited(path):
        raise UserError(f"{key}: is not read for {path.name}, whose format has no separators; leave it out")
    separator = "\t" if separator == "\\t" else separator
    if len(separator.encode()) > 1 or separator in ('"', "\n", "\r", "\0"):
        raise UserError(f'{key}: {separator!r} can\'t separate fields; give one character such as ";" or "|"')
    return separator


def _read_texts(path: Path, items_id: str, items_text: Sequence[str], multiline: bool) -> tuple[dict[str, str], Notes]:
    if not items_text:
        raise UserError("config.data.log.items_text: is empty; name the columns that make up an item's text")
    remedy = "set config.data.log.items_id and .items_text to the file's columns"
    if suffix(path) != ".jsonl":
        return read_texts(path, items_id, items_text, remedy, multiline=multiline)
    texts, missing = {}, dict.fromkeys(items_text)
    for line, row in json_lines.rows(path):
        keys = list(row)
        row |= {name: row[keys[i]] for name in (items_id, *items_text) for i in matches(keys, name)[:1]}
        item = json_lines.id_text(row.get(items_id), items_id, f"{path}:{line}")
        if item is None or not item.strip():
            raise UserError(f"{path}:{line}: no {items_id!r}; add it, or set config.data.log.items_id to the id's name")
        if item in texts:
            raise UserError(f"{path}:{line}: item {item} has an earlier row; keep one of the two")
        texts[item] = join_fields(row.get(name) for name in items_text)
        missing = [name for name in missing if name not in row]
    if texts and missing:
        raise UserError(f"{path}: no line has the key {missing[0]!r}; {remedy}")
    return texts, ()


def _near(item: str, others: Iterable[str]) -> str | None:
    """Another spelling of an item: zeros in front or a `.0` behind, as number columns get them, case, or blanks."""

    def bare(name: str) -> str:
        return re.sub(r"\.0+$", "", name.strip()).lstrip("0").casefold()

    return next((other for other in others if bare(other) == bare(item)), None)
