"""Writes files atomically: a killed run never leaves half a file under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simgr_jax.errors import UserError, first_line


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder. It becomes `path` if the block succeeds, and is
    removed otherwise.

    Raises:
      UserError: the folder can't be created or written.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # Some errors of `shutil` have no `strerror`.
        reason = error.strerror or first_line(error)
        raise UserError(f"{path}: can't be written ({reason}); choose a writable folder") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            # If the folder is the problem, this fails too, and the error above explains it better.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` and a final newline, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes indented JSON, atomically. options: see `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options))
