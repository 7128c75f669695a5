"""What a stage made is kept, and found again by a hash of everything it depends on.

A stage computes `fingerprint(...)` of its inputs, looks for `cache_dir/NAME-FINGERPRINT.SUFFIX`, and on a miss writes
it with `atomic_path`, so that a killed run never leaves half a file under the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from simgr_jax.errors import UserError, first_line


def fingerprint(*parts: Any) -> str:
    """A 16-digit hex hash of `parts`.

    A numpy array counts with its dtype, shape and bytes; a `Path` with the contents of the file (or of every file
    below the folder, with their names); anything else as JSON.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        elif isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                digest.update(str(file.relative_to(part) if part.is_dir() else file.name).encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
        else:
            if isinstance(part, ml_collections.ConfigDict):
                part = part.to_dict()
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that this package wrote.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and it will be made anew") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder, that becomes `path` if the block ends well, and is
    removed if not.

    Raises:
      UserError: the folder can't be made or written.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # `shutil` has errors that say no more than their text.
        reason = error.strerror or first_line(error)
        raise UserError(f"{path}: can't be written ({reason}); choose a folder that can") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            # Where the folder itself is the trouble, so is this; the error above says it better.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, of which the last line is ended here, as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes a JSON file for people to read, too; options: of `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options))
