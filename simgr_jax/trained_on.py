"""What a run was trained on, in its workdir: written once, checked when the run goes on or its model is read.

A config has the data's path, but what is there may change, and a model knows items by their index and their codes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simgr_jax.cache import fingerprint, write_json
from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError
from simgr_jax.files import read_json_object
from simgr_jax.semantic_ids.tokenizer import SemanticIds

FILE_NAME = "trained_on.json"


def save(dataset: Dataset, semantic_ids: SemanticIds, train: Sequences, workdir: Path) -> None:
    """Writes `workdir/trained_on.json`: fingerprints of the items, their codes and the training sequences."""
    sequences = fingerprint(train.values, train.offsets)
    write_json(workdir / FILE_NAME, _of_items(dataset, semantic_ids) | {"training_sequences": sequences})


def check(dataset: Dataset, semantic_ids: SemanticIds, train: Sequences, workdir: Path) -> None:
    """Checks that the workdir's run, if there is one, can go on with these data.

    Raises:
      UserError: it began with others.
    """
    _check(_of_items(dataset, semantic_ids) | {"training_sequences": fingerprint(train.values, train.offsets)}, workdir)


def check_items(dataset: Dataset, semantic_ids: SemanticIds, workdir: Path) -> None:
    """Checks that the workdir's model knows these items: new interactions with them are no trouble.

    Raises:
      UserError: it was trained on others, or on other codes.
    """
    _check(_of_items(dataset, semantic_ids), workdir)


def _of_items(dataset: Dataset, semantic_ids: SemanticIds) -> dict[str, str]:
    return {"items": fingerprint(dataset.item_ids), "semantic_ids": fingerprint(semantic_ids.codes.astype(np.int32))}


def _check(now: dict[str, str], workdir: Path) -> None:
    path = workdir / FILE_NAME
    if not path.exists():
        return
    before = read_json_object(path)
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{path}:{name}: are not those of now; give the data and the cache that the run here was trained with, "
                "or train in a new workdir"
            )
