"""What all binaries share: flags, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
import operator
import os
import re
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from simgr_jax import default_config, distributed, run_config
from simgr_jax.errors import UserError


class ConfigKeys(NamedTuple):
    """What keys a config file's config may have, and which of them it must have."""

    known: ml_collections.ConfigDict
    required: ml_collections.ConfigDict


# Keys of a run's config that say where things are, by the flags that say where they are now.
_PLACES = {"data_path": "data.path", "cache_dir": "cache_dir", "checkpoint": "backbone.checkpoint"}


def run_keys(_: ml_collections.ConfigDict) -> ConfigKeys:
    """A run's config has all keys of the default config, and no others."""
    default = default_config.get_config()
    return ConfigKeys(default, default)


def define_config() -> None:
    """Defines `--config=FILE.py[:argument]` with `--config.key=value` overrides of its (locked) keys."""
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, like configs/amazon.py:beauty.", lock_config=True
    )


def define_places() -> None:
    """Defines the flags of a binary that reads runs, which say where a run's files are now."""
    for flag, key in _PLACES.items():
        flags.DEFINE_string(flag, None, f"A run's config.{key} now, if that is not where it was when the run began.")


def places() -> dict[str, str]:
    """What those flags say that were given, by the config's full key."""
    values = {key: flags.FLAGS[flag].value for flag, key in _PLACES.items()}
    return {key: value for key, value in values.items() if value is not None}


def define_run() -> None:
    """Defines the flags of a binary that reads a run of `simgr_jax.train`, for `open_run`."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of simgr_jax.train.")
    define_places()


def open_run() -> tuple[ml_collections.ConfigDict, Path]:
    """The config of the run that the flags name, with the places that they give, and its workdir.

    Raises:
      UserError: no --workdir, or no run in it.
    """
    workdir = required_path("workdir")
    config = run_config.load(workdir)
    config.update_from_flattened_dict(places())
    return config, workdir


def define_processes() -> None:
    """Defines the flags of a binary that may be several processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens at, for the others to find it.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def run(main: Callable[[], None], config_keys: Callable[[ml_collections.ConfigDict], ConfigKeys] = run_keys) -> None:
    """Parses the flags, runs `main`, and ends the process.

    config_keys: from what a config file returns to the keys that it may have.

    A `UserError` becomes one line on stderr and exit code 2; any other exception keeps its traceback, as it is our bug.
    Of several processes that fail alike, the first says why; one that fails alone does not wait for the others.
    """
    _silence_libraries()
    app.define_help_flags()
    try:
        _parse(sys.argv, config_keys)
        if "coordinator" in flags.FLAGS:
            distributed.initialize(
                *(flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id"))
            )
        main()
        distributed.barrier()
    except UserError as error:
        together = distributed.fail_together()
        if distributed.is_main() or not together:
            print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.leave(2, together)
    except KeyboardInterrupt:
        distributed.leave(130)
    except Exception:
        if not distributed.several():
            raise
        traceback.print_exc()
        distributed.leave(1)


def _silence_libraries() -> None:
    """Leaves stderr to this package: what goes wrong in a library reaches the main thread as an exception.

    Orbax, for one, logs what it then raises, and its reading threads complain of each other's failures in tracebacks.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger().setLevel(logging.CRITICAL)
    logging.getLogger("simgr_jax").setLevel(logging.WARNING)
    sys.unraisablehook = lambda unraisable: None
    report = sys.excepthook
    sys.excepthook = lambda *error: report(*error) if threading.current_thread() is threading.main_thread() else None


def required(name: str) -> str:
    """The value of the flag `--name`.

    Raises:
      UserError: it was not given.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name}: is missing; give --{name}=...")
    return value


def _parse(argv: list[str], config_keys: Callable[[ml_collections.ConfigDict], ConfigKeys]) -> None:
    file = _config_file(argv) if "config" in flags.FLAGS else None
    if "config" in flags.FLAGS:
        _check_config(argv, file, config_keys)
    try:
        remaining = flags.FLAGS(argv)
    except flags.Error as error:
        raise _flag_error(str(error).removeprefix("flag "), file) from error
    if len(remaining) > 1:
        raise UserError(f"{remaining[1]}: is no flag; flags look like --name=value")


def _flag_error(message: str, file: str | None) -> UserError:
    """message: absl's, `--NAME=VALUE: what is wrong` where the value has the wrong type."""
    if file and (match := re.match(r"--(?:no)?(config\.[\w.]+)=(.*?): ", message)):
        key, value = match.groups()
        default = functools.reduce(operator.getitem, key.split(".")[1:], _load_config(file))
        return UserError(f"{key}: {value!r} is no {type(default).__name__}; give a value like {default!r}")
    return UserError(f"{message}; see --help")


def _check_config(
    argv: list[str], file: str | None, config_keys: Callable[[ml_collections.ConfigDict], ConfigKeys]
) -> None:
    """Loads the config file and checks the names of its keys and of the overrides.

    ml_collections would do it too, but what it raises does not say where in the file, or of which key.
    """
    overrides = [match[1] for arg in argv[1:] if (match := re.match(r"--?(?:no)?(config\.[^=]+)", arg))]
    if file is None:
        if overrides:
            raise UserError(f"{overrides[0]}: there is no --config to change; give --config=FILE.py before it")
        return
    config = _load_config(file)
    # Dictionaries, for their order: the nearest key is the first of equally near ones.
    allowed, must_have = config_keys(config)
    keys, known, required = (dict.fromkeys(_keys(one, "config")) for one in (config, allowed, must_have))
    for where, names in ((f"{file}: ", keys), ("", overrides)):
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
                raise UserError(f"{where}{name}: the config has no such key; did you mean {nearest}?")
    if missing := required.keys() - keys.keys():
        raise UserError(f"{file}: {min(missing)}: is missing; runs' keys are simgr_jax.default_config.get_config()'s")
    defaults = run_config.flat(allowed)
    for name, value in run_config.flat(config).items():
        if value is None and f"config.{name}" not in overrides:
            if name not in defaults:
                raise UserError(f"{file}: config.{name}: is None; it is a group of keys, give them or leave it out")
            if defaults[name] is not None:
                raise UserError(f"{file}: config.{name}: is None; give a value like {defaults[name]!r}")
    for name in overrides:
        if child := next((key for key in keys if key.startswith(f"{name}.")), None):
            raise UserError(f"{name}: is a group of keys; set them one by one, like --{child}=...")
        if name not in keys:
            raise UserError(f"{name}: is not set in {file}, so there is nothing to override; set it there")


def _config_file(argv: list[str]) -> str | None:
    """FILE of `--config=FILE` or `--config FILE`."""
    files = []
    for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            files.append(match[1] if match[1] is not None else following)
    if len(files) > 1:
        raise UserError(f"--config={files[1]}: is a second --config; give one")
    return files[0] if files else None


def _load_config(file: str) -> ml_collections.ConfigDict:
    """file: FILE.py or FILE.py:argument."""
    path, colon, argument = file.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={file}: there is no such file; give --config=configs/NAME.py")
    try:
        config = runpy.run_path(path)["get_config"](*[argument] if colon else [])
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise UserError(
            f"{path}:{line}: fails with {type(error).__name__}: {error}; mend the file, or its argument after the colon"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() returns a {type(config).__name__}; return a ConfigDict")
    return config


def _keys(config: ml_collections.ConfigDict, prefix: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}.{name}")
        yield f"{prefix}.{name}"


def required_path(name: str) -> Path:
    """The path that a flag gives, "~" being the user's home.

    Raises:
      UserError: it was left out.
    """
    return Path(os.path.expanduser(required(name)))


def open_workdir(path: str) -> Path:
    """The workdir, made if it is not there.

    Raises:
      UserError: it can't be made or written.
    """
    workdir = Path(os.path.expanduser(path))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: can't be made a workdir ({error.strerror}); choose another --workdir") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"{workdir}: can't be written; choose another --workdir")
    return workdir
