"""What all binaries share: flags, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from simgr_jax.errors import UserError


def define_config() -> None:
    """Defines `--config=FILE.py[:argument]` with `--config.key=value` overrides of its (locked) keys."""
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, like configs/amazon.py:beauty.", lock_config=True
    )


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main`, and ends the process.

    A `UserError` becomes one line on stderr and exit code 2; any other exception keeps its traceback, as it is our bug.
    """
    _use_huge_pages()
    logging.set_verbosity(logging.WARNING)
    try:
        _parse(sys.argv)
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _use_huge_pages() -> None:
    """Starts this program anew with glibc's allocator asking for huge pages, unless GLIBC_TUNABLES is set.

    Logits of tens of megabytes are allocated in every step, and with 4 KiB pages their page faults take a third of a
    CPU step's time (benchmarks/huge_pages.py). The allocator reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def required(name: str) -> str:
    """The value of the flag `--name`.

    Raises:
      UserError: it was not given.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name}: is missing; give --{name}=...")
    return value


def _parse(argv: list[str]) -> None:
    try:
        remaining = flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:
        # What ml_collections raises for an override of a key that the config does not have.
        raise _unknown_key(argv) or error from error
    except (flags.Error, OSError) as error:
        raise UserError(_flag_message(argv, str(error))) from error
    if len(remaining) > 1:
        raise UserError(f"{remaining[1]}: is no flag; flags look like --name=value")
    try:
        # A missing config file is reported by ml_collections only when the config is first used.
        _ = flags.FLAGS["config"].value and flags.FLAGS.config.keys() if "config" in flags.FLAGS else None
    except OSError as error:
        raise UserError(_flag_message(argv, str(error))) from error


def _flag_message(argv: list[str], message: str) -> str:
    config_file = next((arg.partition("=")[2] for arg in argv if arg.startswith(("--config=", "-config="))), "")
    if "Failed loading config file" in message:
        return f"{config_file}: there is no such config file; give --config=configs/NAME.py"
    if "Error whilst parsing config file" in message:
        last_line = message.strip().splitlines()[-1]
        if "UserError: " in last_line:
            return last_line.partition("UserError: ")[2]
        return f"{config_file}: fails with {last_line}; mend the file or its argument"
    return f"{' '.join(message.split())}; see --help"


def _unknown_key(argv: list[str]) -> UserError | None:
    """What to say of the first `--config.key` that the config does not have."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS([argv[0]] + [arg for arg in argv[1:] if arg.startswith("--config=")])
    known = list(_keys(flags.FLAGS.config, "config"))
    for arg in argv[1:]:
        key = arg.lstrip("-").partition("=")[0]
        if key.startswith("config.") and key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)[0]
            return UserError(f"{key}: the config has no such key; did you mean {nearest}?")
    return None


def _keys(config: ml_collections.ConfigDict, prefix: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}.{name}")
        yield f"{prefix}.{name}"


def open_workdir(path: str) -> Path:
    """The workdir, made if it is not there.

    Raises:
      UserError: it can't be made or written.
    """
    workdir = Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: can't be made a workdir ({error.strerror}); choose another --workdir") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"{workdir}: can't be written; choose another --workdir")
    return workdir
