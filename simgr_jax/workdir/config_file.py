"""The run's config in its workdir, `config.json`: written once, checked when the run continues, and read by all
binaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import write_json
from simgr_jax.workdir.read_files import read_json_object

FILE_NAME = "config.json"
VERSION_KEY = "config_version"
# Raise it when older runs' keys can no longer be read. A new key needs no new version: older runs get its default.
VERSION = 2


def save(values: dict[str, Any], workdir: Path) -> None:
    """Writes `workdir/config.json`.

    Args:
      values: the config as nested dictionaries.
    """
    write_json(workdir / FILE_NAME, {VERSION_KEY: VERSION} | values)


def load(workdir: Path) -> dict[str, Any]:
    """What `save` wrote, with tuples instead of lists.

    Raises:
      UserError: there is no config, it can't be read, or another version of the package wrote it.
    """
    path = workdir / FILE_NAME
    if not path.exists():
        raise UserError(f"{path}: is not there; give the --workdir of a run of simgr_jax.train")
    values = read_json_object(path)
    version = values.pop(VERSION_KEY, 1)
    if version != VERSION:
        raise UserError(
            f"{path}: is of config version {version}, and this simgr_jax reads version {VERSION}; use the simgr_jax "
            "that trained it, or train in a new workdir"
        )
    return _tuples(values)


def _tuples(value: Any) -> Any:
    """JSON has only lists; a config's sequences are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(child) for key, child in value.items()}
    return tuple(_tuples(child) for child in value) if isinstance(value, list) else value
