"""What all binaries share: flags, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import functools
import logging
import operator
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from simgr_jax import config_files, standard_output
from simgr_jax.config_files import RUN_CONFIG, ConfigKind
from simgr_jax.devices import distributed
from simgr_jax.errors import Stopped, UserError
from simgr_jax.run import Run

# The flags that say where a run's files are now, and the config keys that said where they were.
_PLACES = {"data_path": "data.path", "cache_dir": "cache_dir", "checkpoint": "backbone.checkpoint"}


def define_config() -> None:
    """Defines `--config=FILE.py[:argument]` or `--config=NAME[:argument]`, with `--config.key=value` overrides."""
    config_flags.DEFINE_config_file(
        "config", None, "A config file, or the name of one in configs/, like amazon:beauty.", lock_config=True
    )


def define_places() -> None:
    """Defines the flags of a binary that reads runs, which say where a run's files are now."""
    for flag, key in _PLACES.items():
        flags.DEFINE_string(flag, None, f"The run's config.{key} now, if it has moved since the run began.")


def places() -> dict[str, str]:
    """The values of the place flags that were given, by full config key."""
    values = {key: flags.FLAGS[flag].value for flag, key in _PLACES.items()}
    return {key: value for key, value in values.items() if value is not None}


def define_run() -> None:
    """Defines the flags of a binary that reads a run of `simgr_jax.train`, for `open_run`."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of simgr_jax.train.")
    define_places()


def open_run() -> Run:
    """The run that the flags name, with the places that they give.

    Raises:
      UserError: no --workdir, or no run in it.
    """
    return Run.load(required_path("workdir"), places())


def define_processes() -> None:
    """Defines the flags of a binary that may run as several processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 listens for the other processes.")
    flags.DEFINE_integer("num_processes", None, "The number of processes.")
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def run(main: Callable[[], None], kind: ConfigKind = RUN_CONFIG) -> None:
    """Parses the flags, runs `main`, and ends the process.

    A `UserError` becomes one line on stderr and exit code 2; any other exception is a bug and keeps its traceback.
    If several processes fail alike, only the first says why; one that fails alone does not wait for the others.
    Output that can't be printed, e.g. because its reader has ended, is dropped with a warning.
    SIGINT and SIGTERM end the process at once, except in the training loop, which saves a checkpoint first; then the
    exit code is that of `Stopped`.
    """
    _silence_libraries()
    _end_at_once()
    app.define_help_flags()
    with standard_output.never_fails():
        _run(main, kind)


def _run(main: Callable[[], None], kind: ConfigKind) -> None:
    try:
        _parse(sys.argv, kind)
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
    except Stopped as stopped:
        if distributed.is_main():
            print(f"{stopped}; give the same command again to continue", file=sys.stderr, flush=True)
        distributed.leave(Stopped.EXIT_CODE, distributed.fail_together())
    except KeyboardInterrupt:
        distributed.leave(130)
    except Exception:
        if not distributed.several():
            raise
        traceback.print_exc()
        distributed.leave(1)


def _silence_libraries() -> None:
    """Keeps libraries from writing to stderr: their errors reach the main thread as exceptions.

    Orbax, for example, also logs the errors that it raises, and its threads print tracebacks of each other's failures.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger().setLevel(logging.CRITICAL)
    logging.getLogger("simgr_jax").setLevel(logging.WARNING)
    sys.unraisablehook = lambda unraisable: None
    report = sys.excepthook
    sys.excepthook = lambda *error: report(*error) if threading.current_thread() is threading.main_thread() else None


def _end_at_once() -> None:
    """Lets SIGINT end the process as SIGTERM does: libraries, and Python's own clean-up, swallow KeyboardInterrupts."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def required(name: str) -> str:
    """The value of the flag `--name`.

    Raises:
      UserError: it was not given.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name}: is missing; give --{name}=...")
    return value


def _parse(argv: list[str], kind: ConfigKind) -> None:
    has_config = "config" in flags.FLAGS
    if has_config and any(re.match(r"--?flagfile\b", arg) for arg in argv[1:]):
        # The keys that it sets could not be checked.
        raise UserError("--flagfile: is not supported; give the flags themselves, or write a config file")
    argv, file = _find_config(argv) if has_config else (argv, None)
    overridden = _overridden(argv) if has_config else []
    if file:
        config_files.check_keys(config_files.run_file(file), file, kind, overridden)
    elif overridden:
        raise UserError(f"{overridden[0]}: there is no --config to change; give --config=FILE.py before it")
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # ml_collections imports the config file; nothing is to appear beside it.
    try:
        remaining = flags.FLAGS(argv)
    except flags.Error as error:
        raise _flag_error(str(error).removeprefix("flag "), file) from error
    finally:
        sys.dont_write_bytecode = before
    if len(remaining) > 1:
        raise UserError(f"{remaining[1]}: is not a flag; flags look like --name=value")
    if file:
        kind.check_overrides(flags.FLAGS.config, [key.removeprefix("config.") for key in overridden])


def _flag_error(message: str, file: str | None) -> UserError:
    """message: absl's; `--NAME=VALUE: what is wrong` if the value has the wrong type."""
    if file and (match := re.match(r"--(?:no)?(config\.[\w.]+)=(.*?): ", message)):
        key, value = match.groups()
        default = functools.reduce(operator.getitem, key.split(".")[1:], config_files.run_file(file))
        return UserError(f"{key}: {value!r} is not of type {type(default).__name__}; give a value like {default!r}")
    return UserError(f"{message}; see --help")


def _overridden(argv: list[str]) -> list[str]:
    """The keys that --config.KEY flags set."""
    return [match[1] for arg in argv[1:] if (match := re.match(r"--?(?:no)?(config\.[^=]+)", arg))]


def _find_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments with the path of the file that `--config=FILE` or `--config FILE` names, and that path."""
    argv, files = list(argv), []
    for place, arg in enumerate(argv):
        if match := re.fullmatch(r"(--?config)(=.*)?", arg):
            # The value may be a separate argument.
            following = place + 1 < len(argv)
            value = match[2][1:] if match[2] else argv[place + 1] if following else ""
            files.append((value, place))
    if len(files) > 1:
        raise UserError(f"--config={files[1][0]}: is a second --config; give one")
    if not files:
        return argv, None
    (value, place) = files[0]
    file = config_files.find(value)
    if "=" in argv[place]:
        argv[place] = f"--config={file}"
    else:
        argv[place + 1] = file
    return argv, file


def required_path(name: str) -> Path:
    """The path that a flag gives. "~" is the user's home.

    Raises:
      UserError: the flag was not given.
    """
    return Path(os.path.expanduser(required(name)))


def open_workdir(path: str) -> Path:
    """The workdir, created if it does not exist.

    Raises:
      UserError: it can't be created or written.
    """
    workdir = Path(os.path.expanduser(path))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: can't be created ({error.strerror}); choose another --workdir") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"{workdir}: can't be written; choose another --workdir")
    return workdir
