"""Reads users' files. Whatever is wrong with a file becomes a one-line error that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simgr_jax.errors import UserError


def require_folder(path: Path) -> Path:
    """Returns `path`.

    Raises:
      UserError: it is not a folder.
    """
    if not path.is_dir():
        problem = "is a file, not a folder" if path.is_file() else "no such folder"
        raise UserError(
            f"{path}: {problem}; set config.data.path to the folder with the dataset's files, or for a log "
            "config.data.format=log"
        )
    return path


def require_file(path: Path, remedy: str = "check the path") -> Path:
    """Returns `path`.

    Raises:
      UserError: it is missing, not a file, or empty.
    """
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {problem}; {remedy}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; copy it again from its source")
    return path


def find_file(folder: Path, *patterns: str, required: bool = False) -> Path | None:
    """The one file below `folder` that matches any of the glob `patterns`, or None.

    Raises:
      UserError: several files match, or none does and one is `required`.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:3])
        raise UserError(f"{folder}: {len(found)} files match {patterns[0]} ({names}); keep one dataset per folder")
    if not found and required:
        raise UserError(f"{folder}: no file {patterns[0]}; copy the dataset's files there, or check config.data.path")
    return require_file(found[0]) if found else None


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file, without its byte order mark if it has one.

    Raises:
      UserError: it is missing, unreadable, empty, or not UTF-8.
    """
    require_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file, e.g. with iconv -t UTF-8") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: as `read_text`; or the file is not JSON or not an object, or an object in it repeats a key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: has a JSON {type(value).__name__} instead of an object; check the file's format")
    return value


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
      UserError: as `read_json_object`, without the object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}:{twice}: the key occurs more than once; keep one of its entries")
        return result

    try:
        return json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); copy the file again from its source"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: JSON nested too deeply to read; check that it is the right file") from error
    except ValueError as error:  # An integer of thousands of digits, which Python refuses to convert.
        raise UserError(f"{path}: has a number too long to read ({error}); check that it is the right file") from error


def is_text(string: str) -> bool:
    """Whether a string can be written as UTF-8. JSON can hold one half of a character of two UTF-16 units."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_log_line(line: bytes, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl: an object with the whole number `step`.

    Args:
      where: FILE:LINE, for the message.

    Raises:
      UserError: it is not.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON in UTF-8 ({error}); remove the line") from error
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise UserError(f"{where}: is not an object with a number `step`; remove the line")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    Raises:
      UserError: it is missing or empty, or a line is not an object with the whole number `step`.
    """
    require_file(path)
    lines = path.read_bytes().splitlines()
    return [read_log_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
