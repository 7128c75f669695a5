"""Config files: finding one by name or path, running it, and checking the names of its keys."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from simgr_jax import default_config
from simgr_jax.config_keys import check_overrides, flat, with_values
from simgr_jax.errors import UserError


class ConfigKind(NamedTuple):
    """A kind of config that files return: a run's or a comparison's.

    Attributes:
      keys: maps a file's config to the keys that it may have and the keys that it must have.
      check_overrides: takes a config and the full keys of its overrides, and refuses overrides without effect.
    """

    keys: Callable[[ml_collections.ConfigDict], tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]]
    check_overrides: Callable[[ml_collections.ConfigDict, Collection[str]], None]


def _run_keys(_: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    default = default_config.get_config()
    return default, default


# A run's config has all keys of the default config, and no others.
RUN_CONFIG = ConfigKind(_run_keys, check_overrides)


def load_run_config(
    config: str | Path | ml_collections.ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
    """A run's config, locked.

    Args:
      config: a config, or the file that makes it: see `find`.
      overrides: values by full key, like {"training.epochs": 2}.

    Raises:
      UserError: the file can't be run, a key is unknown, a value has the wrong type, or the model does not read an
        overridden key.
    """
    file = "the config"
    if not isinstance(config, ml_collections.ConfigDict):
        file = find(str(config))
        config = run_file(file)
    check_keys(config, file, RUN_CONFIG, [f"config.{key}" for key in overrides or {}])
    config = with_values(config, overrides or {}).lock()
    check_overrides(config, overrides or {})
    return config


def find(name: str) -> str:
    """The config file that `--config` names, with its argument after a colon.

    Args:
      name: a path like configs/amazon.py:beauty, or the name of a file in configs/, like amazon:beauty.

    Raises:
      UserError: there is no such file.
    """
    path, colon, argument = name.partition(":")
    if re.fullmatch(r"\w+", path):
        for folder in _config_folders():
            if (file := folder / f"{path}.py").is_file():
                return f"{file}{colon}{argument}"
    if (file := Path(os.path.expanduser(path))).is_file():
        return f"{file}{colon}{argument}"
    known = sorted({file.stem for folder in _config_folders() for file in folder.glob("*.py")} - {"__init__"})
    raise UserError(f"--config={name}: there is no such file; give its path, or one of {', '.join(known)}")


def _config_folders() -> list[Path]:
    """The configs/ folder: installed within the package, or beside the package in a clone."""
    package = Path(str(resources.files("simgr_jax")))
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def run_file(file: str) -> ml_collections.ConfigDict:
    """What a config file's `get_config` returns.

    Args:
      file: FILE.py or FILE.py:argument.

    Raises:
      UserError: it fails, or returns something other than a config.
    """
    path, colon, argument = file.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](*[argument] if colon else [])
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise UserError(
            f"{path}:{line}: fails with {type(error).__name__}: {error}; fix the file, or its argument after the colon"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() returns a {type(config).__name__}; return a ConfigDict")
    _check_groups(config, path, "config", {})
    return config


def _check_groups(group: ml_collections.ConfigDict, path: str, name: str, names: dict[int, str]) -> None:
    """Refuses one group under two names, as setting a key of either would set the other's, too.

    Args:
      names: the groups met so far, by identity.
    """
    if id(group) in names:
        raise UserError(
            f"{path}: {names[id(group)]} and {name} are the same dictionary; give each its own, like dict(...)"
        )
    names[id(group)] = name
    for key, value in group.items():
        if isinstance(value, ml_collections.ConfigDict):
            _check_groups(value, path, f"{name}.{key}", names)


def check_keys(config: ml_collections.ConfigDict, file: str, kind: ConfigKind, overridden: Collection[str]) -> None:
    """Checks the names of a config's keys and of the overrides.

    ml_collections also checks them, but its errors don't name the file or the key.

    Args:
      file: where the config is from, for messages.
      overridden: full keys, like config.training.epochs.

    Raises:
      UserError: a key is unknown, is missing, or is a group where it should be a value.
    """
    # Dictionaries, because they keep the order: of several equally near keys, a message suggests the first.
    allowed, must_have = kind.keys(config)
    keys, known, required = (dict.fromkeys(_keys(one, "config")) for one in (config, allowed, must_have))
    for where, names in ((f"{file}: ", keys), ("", overridden)):
        for name in names:
            if name not in known:
                group = next((parent for parent in _parents(name) if parent in known), None)
                if group and group not in _groups(allowed, "config"):
                    raise UserError(f"{where}{name}: {group} is a value, not a group; give {group} itself")
                nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
                raise UserError(f"{where}{name}: the config has no such key; did you mean {nearest}?")
    if missing := required.keys() - keys.keys():
        raise UserError(
            f"{file}: {min(missing)}: is missing; begin with simgr_jax.default_config.get_config(), which has all keys"
        )
    defaults = flat(allowed)
    for name, value in flat(config).items():
        if value is None and f"config.{name}" not in overridden:
            if name not in defaults:
                raise UserError(f"{file}: config.{name}: is None; it is a group of keys, give them or leave it out")
            if defaults[name] is not None:
                raise UserError(f"{file}: config.{name}: is None; give a value like {defaults[name]!r}")
    for name in overridden:
        if child := next((key for key in keys if key.startswith(f"{name}.")), None):
            raise UserError(f"{name}: is a group of keys; set them one by one, like --{child}=...")
        if name not in keys:
            raise UserError(f"{name}: is not set in {file}, so there is nothing to override; set it there")


def _keys(config: ml_collections.ConfigDict, prefix: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}.{name}")
        yield f"{prefix}.{name}"


def _groups(config: ml_collections.ConfigDict, prefix: str) -> set[str]:
    return {name.rpartition(".")[0] for name in _keys(config, prefix)}


def _parents(name: str) -> Iterator[str]:
    """The groups that a key is in, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
