"""Reads RecBole's atomic files: `*.inter` and optionally `*.item`. They are tab-separated tables whose header gives
each column a type, e.g. `user_id:token  item_id:token  rating:float  timestamp:float`."""

from __future__ import annotations

from pathlib import Path

from simgr_jax.data.dataset import Dataset
from simgr_jax.data.interactions import from_frame
from simgr_jax.data.item_text import join_fields
from simgr_jax.data.readers.tables import column_names, read_columns, read_interactions
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import find_file, require_folder

COLUMNS = {"user": "user_id:token", "item": "item_id:token", "timestamp": "timestamp:float"}
TEXT_TYPES = ("token", "token_seq")
_REMEDY = "name the columns and their types as RecBole does"


def files(folder: Path) -> list[Path]:
    require_folder(folder)
    inter, item = find_file(folder, "*.inter", required=True), find_file(folder, "*.item")
    return [inter, item] if item else [inter]


def read(folder: Path, name: str, k_core: int = 0) -> Dataset:
    """Reads the interactions (see `from_frame`).

    An item's text joins its token and token_seq columns in file order. Items that `*.item`
    lacks, as in some published files, have an empty text.

    Raises:
      UserError: a file is missing, not UTF-8 or malformed; a timestamp is not a number; an item has two rows in
        `*.item`; or nothing is left after k-core filtering.
    """
    inter, *item = files(folder)
    frame = read_interactions(inter, COLUMNS, _REMEDY, separator="\t")
    return from_frame(frame, name, k_core, _read_texts(item[0]) if item else None)


def _read_texts(path: Path) -> dict[str, str]:
    names = column_names(path, separator="\t")
    text_names = [name for name in names if name.rpartition(":")[2] in TEXT_TYPES and name != COLUMNS["item"]]
    columns = {"id": COLUMNS["item"], **{f"text{i}": name for i, name in enumerate(text_names)}}
    table = read_columns(path, columns, _REMEDY, separator="\t")
    table = table.drop_nulls("id")  # polars reads a blank line as a row
    texts = {item: join_fields(fields) for item, *fields in table.iter_rows()}
    if len(texts) < len(table):
        twice = table.filter(table["id"].is_duplicated())["id"][0]
        raise UserError(f"{path}: item {twice} has more than one row; keep one of them")
    return texts
