"""Caches the result of a stage under a hash of everything it depends on.

A stage computes `fingerprint(...)` of its inputs, looks for `cache_dir/NAME-FINGERPRINT.SUFFIX`, and on a miss writes
it with `atomic_path`, so that a killed run never leaves half a file under the final name.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from simgr_jax.errors import UserError


def fingerprint(*parts: Any) -> str:
    """A 16-digit hex hash of `parts`.

    An array is hashed by dtype, shape and bytes; a `Path` by the name and contents of the file, or of every file below
    the folder; anything else as JSON.
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
    """Loads the arrays of an npz file that this package wrote.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and it will be made again") from error
