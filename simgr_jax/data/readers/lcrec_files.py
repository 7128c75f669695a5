"""Reads LC-Rec files: `*.inter.json`, {user: [items in time order]}, and optionally `*.item.json`,
{item: {"title": ...}}, and `*.index.json`, {item: ["<a_1>", "<b_2>", ...]}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.readers.catalog import read_catalog
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import find_file, is_text, read_json_object, require_folder


def files(folder: Path) -> list[Path]:
    require_folder(folder)
    inter = find_file(folder, "*.inter.json", required=True)
    return [inter, *(path for path in [find_file(folder, "*.item.json"), find_file(folder, "*.index.json")] if path)]


def read(folder: Path, name: str) -> Dataset:
    """The catalog holds the items of `*.item.json`, else of `*.index.json`, else of the sequences.

    Numeric item ids are sorted by number.

    Raises:
      UserError: a file is missing, not UTF-8 or not JSON; a user has no items, or a value that is not a list of items;
        an item of a sequence is not in the catalog; or an item has no semantic ID in `*.index.json`.
    """
    path, *_ = files(folder)
    rows = {user: _items(items, f"{path}:{user}") for user, items in read_json_object(path).items()}
    if not rows:
        raise UserError(f"{path}: has no users; copy the file again from its source")
    if bad := next((user for user in rows if not is_text(user)), None):
        raise UserError(f"{path}: user {bad!r} has half a character; correct it")
    seen = (item for items in rows.values() for item in items)
    catalog = read_catalog(find_file(folder, "*.item.json"), find_file(folder, "*.index.json"), seen)
    return Dataset(
        name=name,
        user_ids=list(rows),
        item_ids=catalog.item_ids,
        sequences=Sequences.from_lists(catalog.indices(items, f"{path}:{user}") for user, items in rows.items()),
        item_texts=catalog.item_texts,
        codes=catalog.codes,
        codebook_sizes=catalog.codebook_sizes,
    )


def _items(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(type(item) in (int, str) and is_text(str(item)) for item in value):
        raise UserError(f"{where}: {value!r:.80} is not a list of items; write e.g. [3, 14, 15]")
    if not value:
        raise UserError(f"{where}: the user has no items; remove the user")
    return [str(item) for item in value]
