"""Writes files atomically: a killed run never leaves half a file under its final name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simgr_jax.errors import UserError, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAKE_ROOM = "free some space, and give the same command again"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder. It becomes `path` if the block succeeds, and is
    removed otherwise. If `path` is a link, what it leads to is written, and the link stays.

    Raises:
      UserError: the folder can't be created or written, or `path` is a device or a pipe.
    """
    check_target(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        if is_full_disk(error):
            raise UserError(f"{path}: can't be written ({os.strerror(errno.ENOSPC)}); {_MAKE_ROOM}") from error
        if not isinstance(error, OSError):
            raise
        # Some errors of `shutil` have no `strerror`.
        reason = error.strerror or first_line(error)
        raise UserError(f"{path}: can't be written ({reason}); choose a writable folder") from error
    finally:
        _remove(temporary)


def check_target(path: Path) -> None:
    """
    Raises:
      UserError: the path is a device, a pipe or a socket, which can't be replaced by a file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a device or a pipe, not a file; give the path of a file")


def is_full_disk(error: BaseException) -> bool:
    """Whether the error, or one that it came from, says that a disk or quota is full. Libraries have types of their
    own for it."""
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "errno", None) in _FULL or any(os.strerror(number) in str(chain) for number in _FULL):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextlib.contextmanager
def one_line_on_a_full_disk(folder: Path) -> Iterator[None]:
    """For a block whose libraries write below the folder.

    Raises:
      UserError: the block failed because the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise UserError(f"{folder}: {os.strerror(errno.ENOSPC)}; {_MAKE_ROOM}") from error
        raise


def remove_leftovers(folder: Path, min_age: float = 0.0) -> None:
    """Removes the temporary files and folders of killed processes that are directly in the folder.

    Args:
      min_age: only those that were not changed for this many seconds; younger ones may still be written.
    """
    for path in folder.glob(".*-*"):
        if re.match(r"\.[0-9a-f]{32}-", path.name):
            with contextlib.suppress(OSError):  # Another process may have removed it.
                if time.time() - path.lstat().st_mtime >= min_age:
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # If the folder is the problem, this fails too, and the error of the write explains it better.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` and a final newline, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes indented JSON, atomically. options: see `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options))
