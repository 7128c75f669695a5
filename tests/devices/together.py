"""The program that test_distributed.py runs in several processes: `python together.py CASE FOLDER [flags]`.

Each process writes its findings to FOLDER/PROCESS.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from simgr_jax import cli
from simgr_jax.devices import distributed
from simgr_jax.errors import UserError


def agree(folder: Path) -> None:
    """Everything that works when all goes well."""
    print("hello")
    Console().print("rich hello")
    os.write(1, b"hello from below\n")
    me = jax.process_index()
    marker = folder / "prepared"
    with distributed.main_first():
        found = marker.exists()
        if me == 0:
            time.sleep(0.5)
            marker.touch()
    distributed.check_same("the semantic IDs", np.arange(5), {"a": 1})
    told = {
        "processes": jax.process_count(),
        "main": distributed.is_main(),
        "found_prepared": found,
        "values": [distributed.all_gather("x" * 3 * me), distributed.all_gather({me: [me]})],
    }
    (folder / f"{me}.json").write_text(json.dumps(told))


def disagree(folder: Path) -> None:
    distributed.check_same("the semantic IDs", np.arange(5) + jax.process_index())


def fail_in_preparation(folder: Path) -> None:
    with distributed.main_first():
        raise UserError("file: is wrong; mend it")


def fail_alone(folder: Path) -> None:
    if jax.process_index() == 1:
        raise UserError("this machine's file: is wrong; mend it")


def crash_alone(folder: Path) -> None:
    if jax.process_index() == 1:
        raise ZeroDivisionError("ours")


if __name__ == "__main__":
    case, folder = sys.argv.pop(1), Path(sys.argv.pop(1))
    distributed.FAILURE_SECONDS = 2
    cli.define_processes()
    cli.run(lambda: globals()[case](folder))
