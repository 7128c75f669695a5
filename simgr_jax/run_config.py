"""A run's config in its workdir: written once, checked when the run goes on, read by the offline binaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_collections

from simgr_jax import default_config
from simgr_jax.cache import atomic_path
from simgr_jax.errors import UserError

FILE_NAME = "config.json"

# Keys that say where things are, not what the run is: they may differ when it goes on.
_PLACES = ("cache_dir", "data.path")


def save(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`, or checks `config` against the one a run began with.

    Raises:
      UserError: the workdir holds a run of another config.
    """
    path = workdir / FILE_NAME
    if path.exists():
        before, now = _flat(load(workdir)), _flat(config)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in _PLACES:
                raise UserError(
                    f"{path}:{key}: the run here has {before.get(key)!r}, not {now.get(key)!r}; go on with the same "
                    "config or choose another --workdir"
                )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load(workdir: Path) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`, locked.

    Raises:
      UserError: there is none, or it can't be read.
    """
    path = workdir / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: is not there; give the --workdir of a run of simgr_jax.train") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); train in a new workdir") from error
    config = default_config.get_config().lock()
    try:
        config.update(_tuples(values))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: was written by another version ({error}); train in a new workdir") from error
    return config


def _tuples(value: Any) -> Any:
    """JSON has only lists; a config's sequences are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(child) for key, child in value.items()}
    return tuple(_tuples(child) for child in value) if isinstance(value, list) else value


def _flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
