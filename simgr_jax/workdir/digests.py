"""Digests of a folder's files, which tell later whether a disk, a copy or a person has changed them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import write_json
from simgr_jax.workdir.read_files import read_json_object

FILE_NAME = "digests.json"
_CHUNK_BYTES = 2**22


def write(folder: Path, without: Collection[str] = ()) -> None:
    """Writes `folder/digests.json`: the size in bytes and the CRC-32 of every file below the folder.

    Args:
      without: the names of files that will still change.

    Raises:
      UserError: it can't be written.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in without)
    digests = zip(files, _digests(files), strict=True)
    write_json(folder / FILE_NAME, {str(file.relative_to(folder)): digest for file, digest in digests})


def find_damage(folder: Path, items: Collection[str] = (), part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with the first file that is not as it was when `write` saw it: one line that begins with the file.
    None if every file is whole. Later files are no damage.

    Args:
      items: the files and folders in `folder` that are checked; () checks all.
      part, num_parts: checks only the part-th of num_parts shares of the files, so that several processes can share the
        work.

    Raises:
      UserError: a file can't be read, which says nothing about what is in it.
    """
    try:
        listed = read_json_object(folder / FILE_NAME)
    except UserError as error:
        return str(error)
    names = sorted(name for name in listed if not items or name.split("/")[0] in items)[part::num_parts]
    for name in names:
        if not (folder / name).is_file():
            return f"{folder / name}: is missing"
    for name, digest in zip(names, _digests([folder / name for name in names]), strict=True):
        if digest != listed[name]:
            return f"{folder / name}: is not what was written there"
    return None


def _digests(files: Sequence[Path]) -> list[list]:
    """[size, hexadecimal CRC-32] of each file."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_digest, files))


def _digest(path: Path) -> list:
    size, checksum, buffer = 0, 0, memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size, checksum = size + count, zlib.crc32(buffer[:count], checksum)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the disk and its permissions") from error
    return [size, f"{checksum:08x}"]
