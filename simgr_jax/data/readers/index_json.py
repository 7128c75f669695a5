"""Ready-made semantic IDs, as LC-Rec and MiniOneRec publish them: `*.index.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simgr_jax.data.code_tokens import parse_token, token_string
from simgr_jax.errors import UserError
from simgr_jax.workdir.read_files import read_json_object

# Codes are int32, and no embedding table could hold a larger codebook.
MAX_CODE = 999_999_999


def read_index_json(path: Path, item_ids: Sequence[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Reads `{"ITEM": ["<a_137>", "<b_5>", ...], ...}`: one token per level, whose letter names the level (see
    `code_tokens.token_string`).

    Ignores items of the file that are not in `item_ids`.

    Returns:
      codes: int32 [N, L], row n for `item_ids[n]`.
      codebook_sizes: [L], one more than the largest code of each level in the whole file.

    Raises:
      UserError: an item is missing, has more or fewer codes than the others, or has a malformed token; or the file
        can't be read (see `read_json_object`).
    """
    index = read_json_object(path)
    codes = {item: _parse(path, item, tokens) for item, tokens in index.items()}
    if not codes:
        raise UserError(f"{path}: has no items; copy the file again from its source")
    first, num_levels = next((item, len(row)) for item, row in codes.items())
    for item, row in codes.items():
        if len(row) != num_levels:
            raise UserError(
                f"{path}:{item}: {len(row)} codes where item {first} has {num_levels}; "
                "give every item the same number of codes"
            )
    missing = next((item for item in item_ids if item not in codes), None)
    if missing is not None:
        raise UserError(f"{path}:{missing}: the item has no semantic ID here; add it, or remove the item from the data")
    sizes = np.array(list(codes.values()), dtype=np.int32).max(axis=0) + 1
    rows = np.array([codes[item] for item in item_ids], dtype=np.int32).reshape(-1, num_levels)
    return rows, tuple(int(size) for size in sizes)


def _parse(path: Path, item: str, tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f'{path}:{item}: {tokens!r:.80} is not a list of tokens; write e.g. ["<a_1>", "<b_2>"]')
    row = []
    for level, token in enumerate(tokens):
        try:
            found_level, code = parse_token(token)
        except (TypeError, ValueError):
            found_level, code = None, None
        if found_level != level or code > MAX_CODE:
            example = token_string(level, 7)
            raise UserError(f"{path}:{item}: {token!r:.80} is not a token of level {level}, like {example}; correct it")
        row.append(code)
    return row
