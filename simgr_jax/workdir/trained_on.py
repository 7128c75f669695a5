"""Fingerprints of what a run learned from, in its workdir. They are written when the run begins, and checked when it
continues or its model is read, because the data behind a config's path may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import write_json
from simgr_jax.workdir.read_files import read_json_object

FILE_NAME = "trained_on.json"


def has_learned(workdir: Path) -> bool:
    """Whether the workdir's run has a checkpoint."""
    return any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*"))


def save(fingerprints: Mapping[str, str], workdir: Path) -> None:
    """Writes `workdir/trained_on.json`. If the run has already learned something, its record stays as it is.

    Args:
      fingerprints: of all that the run learns from, by name. Names are plural, for messages.
    """
    if not has_learned(workdir):
        write_json(workdir / FILE_NAME, dict(fingerprints))


def check(fingerprints: Mapping[str, str], workdir: Path) -> None:
    """Checks that the workdir's run, if it has learned anything, learned from the same things.

    Args:
      fingerprints: the current ones, by name; names that the record lacks are not checked.

    Raises:
      UserError: it learned from something else.
    """
    path = workdir / FILE_NAME
    if not path.exists() or not has_learned(workdir):
        return
    before = read_json_object(path)
    for name, fingerprint in fingerprints.items():
        if before.get(name, fingerprint) != fingerprint:
            raise UserError(
                f"{path}:{name}: have changed since the run here was trained; give the data and the cache that it was "
                "trained with, or train in a new workdir"
            )
