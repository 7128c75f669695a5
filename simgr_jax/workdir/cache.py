"""Caches the result of a stage under a hash of everything it depends on.

A stage computes `fingerprint(...)` of its inputs, looks for `cache_dir/NAME-FINGERPRINT.SUFFIX`, and on a miss writes
it with `atomic_path`, so that a killed run never leaves half a file under the final name.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
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

    All bytes of an array are checked against its checksum before it is used: `np.load` would not come to the checksum
    if a damaged header asked for fewer numbers.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy"): _load_array(archive.read(name)) for name in archive.namelist()}
        if len(arrays) != (count := _count_members(path)):
            raise ValueError(f"{len(arrays)} of {count} arrays are found")
    except Exception as error:  # Damage makes zipfile and NumPy raise many kinds of exceptions.
        raise UserError(f"{path}: is damaged ({error}); remove it, and it will be made again") from error
    return arrays


def _load_array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _count_members(path: Path) -> int:
    """The number of files that a zip file says it has. zipfile does not compare it, and a damaged entry of the list can
    swallow those after it."""
    with path.open("rb") as file:
        file.seek(-22, io.SEEK_END)  # The record at the end of a zip file without a comment.
        return struct.unpack("<H", file.read(22)[10:12])[0]
