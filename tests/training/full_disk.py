"""A run on a small disk, in FOLDER, that is full after its first checkpoint: `python full_disk.py FOLDER`.

Prints the steps of the checkpoints that are kept and the error, and the same after it has continued on an emptied disk.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny_run

from simgr_jax import cli
from simgr_jax.errors import UserError
from simgr_jax.training.checkpoints import Checkpoints
from simgr_jax.workdir.atomic_write import one_line_on_a_full_disk

disk = Path(sys.argv[1])
workdir, filler = disk / "workdir", disk / "filler"
save = Checkpoints.save


def filling(self, state, progress, metrics):
    if int(state.step) == 10:
        self._manager.wait_until_finished()
        room = os.statvfs(disk)
        filler.write_bytes(bytes(room.f_bavail * room.f_bsize - 8192))
    save(self, state, progress, metrics)


def attempt() -> None:
    try:
        with one_line_on_a_full_disk(workdir):
            tiny_run.train(tiny_run.config(), workdir)
    except UserError as error:
        print("error:", error)
    steps = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())
    print("kept:", *steps)


cli._silence_libraries()
Checkpoints.save = filling
attempt()
filler.unlink()
Checkpoints.save = save
attempt()
