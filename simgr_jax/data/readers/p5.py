"""Reads P5 files: `user_sequence.txt`, one line per user (the user, then the items in time order, separated by spaces),
and optionally `item_plain_text.txt`, one line per item (the item, then its text)."""

from __future__ import annotations

from pathlib import Path

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.item_text import unless_missing
from simgr_jax.data.readers.catalog import Catalog
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import read_text, require_file, require_folder

SEQUENCES, TEXTS = "user_sequence.txt", "item_plain_text.txt"


def files(folder: Path) -> list[Path]:
    require_folder(folder)
    sequences = require_file(
        folder / SEQUENCES, "copy the dataset's files there, or check config.data.path and config.data.format"
    )
    return [sequences, *(path for path in [folder / TEXTS] if path.exists())]


def read(folder: Path, name: str) -> Dataset:
    """The catalog lists the items as in the item file; without one, in order of first appearance.

    Raises:
      UserError: a file is missing, empty or not UTF-8; a user has two lines or no items; an item has two lines; or an
        item of a sequence is not in the item file.
    """
    path, *text_files = files(folder)
    rows = {}
    for line, (user, items) in _lines(path, "user"):
        if not items:
            raise UserError(f"{path}:{line}: user {user} has no items; remove the line")
        rows[user] = line, items.split()
    catalog = _read_items(text_files[0]) if text_files else Catalog(_distinct(items for _, items in rows.values()))
    sequences = [catalog.indices(items, f"{path}:{line}") for line, items in rows.values()]
    return Dataset(name, list(rows), catalog.item_ids, Sequences.from_lists(sequences), item_texts=catalog.item_texts)


def _read_items(path: Path) -> Catalog:
    texts = {item: unless_missing(text) for _, (item, text) in _lines(path, "item")}
    return Catalog(list(texts), list(texts.values()), source=path)


def _lines(path: Path, kind: str):
    """Yields (line number, (first word, rest of the line)) of every line that is not blank.

    Raises:
      UserError: two lines begin with the same word, or no line is left.
    """
    first_lines = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if "\r" in line.removesuffix("\r"):
            raise UserError(f"{path}:{number}: ends lines in carriage returns alone; convert them to newlines")
        if not line.strip():
            continue
        word, *rest = line.split(maxsplit=1)
        if word in first_lines:
            raise UserError(f"{path}:{number}: {kind} {word} is already on line {first_lines[word]}; keep one of them")
        first_lines[word] = number
        yield number, (word, rest[0].strip() if rest else "")
    if not first_lines:
        raise UserError(f"{path}: has only blank lines; copy the file again from its source")


def _distinct(sequences) -> list[str]:
    return list(dict.fromkeys(item for sequence in sequences for item in sequence))
