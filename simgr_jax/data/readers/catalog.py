"""The catalog of formats that have item files: the items in order, with their texts and semantic IDs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simgr_jax.data.item_text import join_fields
from simgr_jax.data.readers.index_json import read_index_json
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import is_text, read_json_object

# The fields that make up an item's text, in this order. Files may lack some.
TEXT_FIELDS = ("title", "brand", "categories", "description")
# Python refuses to convert strings of more than 4,300 digits.
_MOST_DIGITS = 4_000


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The items of a dataset.

    Attributes:
      item_ids, item_texts, codes, codebook_sizes: see `Dataset`.
      source: the file that lists the items; None if they are taken from the sequences.
    """

    item_ids: list[str]
    item_texts: list[str] | None = None
    codes: np.ndarray | None = None
    codebook_sizes: tuple[int, ...] = ()
    source: Path | None = None

    def __post_init__(self):
        object.__setattr__(self, "_index", {item: i for i, item in enumerate(self.item_ids)})

    def indices(self, items: Iterable[str], where: str) -> list[int]:
        """The items' indices. where: their file and line (or key), for the error message.

        Raises:
          UserError: an item is not in the catalog.
        """
        try:
            return [self._index[item] for item in items]
        except KeyError as error:
            item = error.args[0]
            raise UserError(f"{where}: item {item} is not in {self.source}; add it there, or remove it here") from None


def _is_number(item: str) -> bool:
    return item.isdecimal() and len(item) <= _MOST_DIGITS


def read_catalog(item_file: Path | None, index_file: Path | None, seen: Iterable[str]) -> Catalog:
    """Reads the items of `*.item.json`, else of `*.index.json`, else takes `seen`. Numeric ids are sorted by number.

    Raises:
      UserError: a file can't be read, or an item lacks its semantic ID or its object of text fields.
    """
    items = read_json_object(item_file) if item_file else None
    source = item_file or index_file
    ids = items if items is not None else read_json_object(index_file) if index_file else dict.fromkeys(seen)
    item_ids = sorted(ids, key=int) if all(map(_is_number, ids)) else list(ids)
    if bad := next((item for item in item_ids if not is_text(item)), None):
        raise UserError(f"{source}: item {bad!r} has half a character; correct it")
    texts = None
    if items is not None:
        texts = []
        for item in item_ids:
            if not isinstance(items[item], dict):
                raise UserError(
                    f'{item_file}:{item}: not an object; write e.g. {{"title": "...", "description": "..."}}'
                )
            texts.append(join_fields(items[item].get(field) for field in TEXT_FIELDS))
    codes, sizes = read_index_json(index_file, item_ids) if index_file else (None, ())
    return Catalog(item_ids, texts, codes, sizes, source)
