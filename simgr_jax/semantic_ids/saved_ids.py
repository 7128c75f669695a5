"""Semantic IDs on disk: the codes and their quality report in NAME.npz; NAME.json shows the report to people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.workdir.atomic_write import atomic_path, write_json
from simgr_jax.workdir.cache import load_arrays


def write(file: Path, semantic_ids: SemanticIds, report: dict[str, Any]) -> None:
    """Writes semantic IDs and their quality report.

    Args:
      file: NAME.npz.
      report: see `quality.report`.

    Raises:
      UserError: the folder can't be written.
    """
    write_json(file.with_suffix(".json"), report)
    sizes, text = np.array(semantic_ids.codebook_sizes), np.frombuffer(json.dumps(report).encode(), np.uint8)
    with atomic_path(file) as temporary:
        np.savez(temporary, codes=semantic_ids.codes, codebook_sizes=sizes, report=text)


def read(file: Path) -> tuple[SemanticIds, dict[str, Any]]:
    """Reads what `write` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    arrays = load_arrays(file)
    report = json.loads(arrays["report"].tobytes())
    return SemanticIds(arrays["codes"], tuple(arrays["codebook_sizes"].tolist())), report
