"""What a run learned from, in its workdir: written when it begins, checked when it goes on or its model is read.

A config has the data's path, but what is there may change, and a model knows items by their index, their codes and, in
prompts with text, its tokens by their numbers. The codes themselves are kept, as new interactions may give others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simgr_jax.cache import fingerprint, write_json
from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.files import read_json_object
from simgr_jax.models.create import BY_INDEX
from simgr_jax.semantic_ids import files
from simgr_jax.semantic_ids.tokenizer import SemanticIds

FILE_NAME = "trained_on.json"
_CODES = "semantic_ids.npz"
# All that `save` writes.
FILES = (FILE_NAME, _CODES, "semantic_ids.json")


def save(
    model: str,
    dataset: Dataset,
    semantic_ids: SemanticIds,
    prompt: Prompt,
    train: Sequences,
    id_quality: dict[str, Any],
    workdir: Path,
) -> None:
    """Writes `workdir/trained_on.json`: fingerprints of the items, the training sequences, and what else `model`, a
    name of `models.create.MODELS`, knows of the items; and the semantic IDs with their quality report (see
    `semantic_ids.files`). What a run has begun to learn from stays as it was written."""
    if _has_learned(workdir):
        return
    files.write(workdir / _CODES, semantic_ids, id_quality)
    record = _of_items(dataset) | _as_read(semantic_ids, prompt) | _of_sequences(train)
    if model in BY_INDEX:
        del record["semantic_ids"]
    write_json(workdir / FILE_NAME, record)


def kept_semantic_ids(dataset: Dataset, workdir: Path) -> tuple[SemanticIds, dict[str, Any]] | None:
    """Those that the workdir's run learned with, and their quality report; None if it has learned nothing yet, or they
    were removed.

    Raises:
      UserError: it was trained on other items; or a file is damaged.
    """
    if not _has_learned(workdir) or not (workdir / _CODES).exists():
        return None
    _check(_of_items(dataset), workdir)
    return files.read(workdir / _CODES)


def check(dataset: Dataset, semantic_ids: SemanticIds, prompt: Prompt, train: Sequences, workdir: Path) -> None:
    """Checks that the workdir's run, if it has learned anything, can go on with these data.

    Raises:
      UserError: it learned from others.
    """
    _check(_of_items(dataset) | _as_read(semantic_ids, prompt) | _of_sequences(train), workdir)


def check_items(dataset: Dataset, semantic_ids: SemanticIds, prompt: Prompt, workdir: Path) -> None:
    """Checks that the workdir's model knows these items. New interactions with them are no trouble.

    Raises:
      UserError: it was trained on others, or on other codes or texts where it reads these.
    """
    _check(_of_items(dataset) | _as_read(semantic_ids, prompt), workdir)


def _of_items(dataset: Dataset) -> dict[str, str]:
    return {"items": fingerprint(dataset.item_ids)}


def _as_read(semantic_ids: SemanticIds, prompt: Prompt) -> dict[str, str]:
    codes = {"semantic_ids": fingerprint(semantic_ids.codes.astype(np.int32))}
    return codes | ({"text_tokens": fingerprint(prompt.text_tokens)} if len(prompt.text_tokens) else {})


def _of_sequences(train: Sequences) -> dict[str, str]:
    return {"training_sequences": fingerprint(train.values, train.offsets)}


def _has_learned(workdir: Path) -> bool:
    return any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*"))


def _check(now: dict[str, str], workdir: Path) -> None:
    path = workdir / FILE_NAME
    if not path.exists() or not _has_learned(workdir):
        return
    before = read_json_object(path)
    for name, value in now.items():
        if before.get(name, value) != value:
            raise UserError(
                f"{path}:{name}: are not those of now; give the data and the cache that the run here was trained with, "
                "or train in a new workdir"
            )
