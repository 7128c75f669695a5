"""Semantic IDs on disk: NAME.npz with the codes and NAME.json, which says how good they are, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simgr_jax.cache import atomic_path, load_arrays, write_json
from simgr_jax.files import read_json_object
from simgr_jax.semantic_ids.tokenizer import SemanticIds


def write(file: Path, semantic_ids: SemanticIds, report: dict[str, Any]) -> None:
    """
    Args:
      file: NAME.npz.
      report: see `quality.report`.

    Raises:
      UserError: the folder can't be written.
    """
    # The report first: codes always have theirs.
    write_json(file.with_suffix(".json"), report)
    with atomic_path(file) as temporary:
        np.savez(temporary, codes=semantic_ids.codes, codebook_sizes=np.array(semantic_ids.codebook_sizes))


def read(file: Path) -> tuple[SemanticIds, dict[str, Any]]:
    """What `write` wrote.

    Raises:
      UserError: a file is not there, or damaged.
    """
    arrays, report = load_arrays(file), read_json_object(file.with_suffix(".json"))
    return SemanticIds(arrays["codes"], tuple(arrays["codebook_sizes"].tolist())), report
