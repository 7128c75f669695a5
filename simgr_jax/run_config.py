"""A run's config in its workdir: written once, checked when the run goes on, read by the offline binaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from simgr_jax import default_config
from simgr_jax.cache import write_json
from simgr_jax.errors import UserError
from simgr_jax.files import read_json_object
from simgr_jax.models.create import MODELS

FILE_NAME = "config.json"

# Keys that say where things are, not what the run is: they may differ when it goes on.
_PLACES = ("cache_dir", "data.path")


def check_same(config: ml_collections.ConfigDict, workdir: Path, otherwise: str = "choose another --workdir") -> None:
    """Checks `config` against the one that the workdir's run began with, if there is one. Where things are may differ,
    and what concerns other models than the config's.

    Args:
      otherwise: what can be done but going on with the same config.

    Raises:
      UserError: the workdir holds a run of another config.
    """
    path = workdir / FILE_NAME
    if not path.exists():
        return
    before, now = flat(load(workdir)), flat(config)
    others = tuple(f"{model}." for model in MODELS if model != config.model.name)
    for key in sorted(now):
        if before[key] != now[key] and key not in _PLACES and not key.startswith(others):
            raise UserError(
                f"{path}:{key}: the run here has {before[key]!r}, not {now[key]!r}; "
                f"go on with the same config or {otherwise}"
            )


def save(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    write_json(workdir / FILE_NAME, config.to_dict())


def load(workdir: Path) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`, locked.

    Raises:
      UserError: there is none, or it can't be read.
    """
    path = workdir / FILE_NAME
    if not path.exists():
        raise UserError(f"{path}: is not there; give the --workdir of a run of simgr_jax.train")
    values = read_json_object(path)
    config = default_config.get_config().lock()
    try:
        config.update(_tuples(values))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # ml_collections lists the whole config after its first sentence.
        reason = str(error.args[0]).partition(". Other fields")[0]
        raise UserError(f"{path}: is not this version's config ({reason}); train in a new workdir") from error
    return config


def _tuples(value: Any) -> Any:
    """JSON has only lists; a config's sequences are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(child) for key, child in value.items()}
    return tuple(_tuples(child) for child in value) if isinstance(value, list) else value


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The config's values by full key, like `data.path`."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values
