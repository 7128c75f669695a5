"""The saved config of a workdir's run: loads it, and compares it when the run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from simgr_jax import default_config
from simgr_jax.config_keys import flat, unread, with_values
from simgr_jax.errors import UserError
from simgr_jax.workdir import config_file

# Keys that say where things are. They may differ when a run continues.
_PLACES = ("cache_dir", "data.path")
# Keys that say how long to train. A run that is trained longer may raise them.
_LENGTHS = ("training.epochs", "training.patience")
# Keys that the run chooses, and the values by which a config lets it. A workdir's config.json has what the run chose.
CHOSEN = {"backbone.dtype": "auto", "training.batch_rows": 0}


def load(workdir: Path) -> ml_collections.ConfigDict:
    """The config in a workdir; keys that were added to simgr_jax since then have their defaults.

    Raises:
      UserError: there is no config, or it can't be read.
    """
    config = default_config.get_config().lock()
    try:
        config.update(config_file.load(workdir))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # ml_collections lists the whole config after its first sentence.
        reason = str(error.args[0]).partition(". Other fields")[0]
        path = workdir / config_file.FILE_NAME
        raise UserError(f"{path}: is not this version's config ({reason}); train in a new workdir") from error
    for key, value in flat(config).items():
        if value is None:
            path = workdir / config_file.FILE_NAME
            raise UserError(f"{path}:{key}: is null; give the value that the run was trained with")
    return config


def with_choices(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with what the workdir's run has chosen, if there is one, for the keys that `config` lets it choose.

    Raises:
      UserError: see `load`.
    """
    now = flat(config)
    keys = [key for key, left_open in CHOSEN.items() if now[key] == left_open]
    if not keys or not (workdir / config_file.FILE_NAME).exists():
        return config
    before = flat(load(workdir))
    return with_values(config, {key: before[key] for key in keys}).lock()


def check_same(
    config: ml_collections.ConfigDict,
    workdir: Path,
    otherwise: str = "choose another --workdir",
    *,
    may_be_longer: bool = False,
) -> None:
    """Checks `config` against the one that the workdir's run began with, if there is one. Only keys that the run reads
    count, and places may differ. A choice that one of the two configs leaves to the run does not differ.

    Args:
      otherwise: what to do instead of continuing with the same config.
      may_be_longer: whether `config` may train for longer: with more `training.epochs` or `training.patience`, and
        with more epochs also from another `optimizer.restart_epoch`.

    Raises:
      UserError: the workdir holds a run of another config.
    """
    path = workdir / config_file.FILE_NAME
    if not path.exists():
        return
    before, now, ignored = flat(load(workdir)), flat(config), unread(config)
    may_differ = {*_PLACES, *ignored, *(_may_differ_if_longer(before, now) if may_be_longer else ())}
    may_differ |= {key for key, left_open in CHOSEN.items() if left_open in (before[key], now[key])}
    for key in sorted(now):
        if before[key] != now[key] and key not in may_differ:
            raise UserError(
                f"{path}:{key}: the run here has {before[key]!r}, not {now[key]!r}; "
                f"continue with the same config, or {otherwise}"
            )


def made_longer(config: ml_collections.ConfigDict, workdir: Path) -> set[str]:
    """The keys by which `config`, which `check_same` lets continue, trains the workdir's run for longer; none if there
    is no run."""
    if not (workdir / config_file.FILE_NAME).exists():
        return set()
    before, now = flat(load(workdir)), flat(config)
    return {key for key in _may_differ_if_longer(before, now) if before[key] != now[key]}


def _may_differ_if_longer(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    longer = {key for key in _LENGTHS if now[key] > before[key]}
    return longer | {"optimizer.restart_epoch"} if "training.epochs" in longer else longer
