"""Compiles a config's train step for a slice of TPUs, on any machine, and prints what running it would take.

    python -m simgr_jax.compile --config=configs/llm.py:full --config.backbone.checkpoint=DIR --topology=v5e:16x16 \\
        --config.training.batch_rows=256 --num_items=10000000

A checkpoint needs only its config.json. --num_items assumes a catalog; without it, the config's data are prepared as
for training. Exit code 1 means that the step does not fit in memory (docs/scale.md).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from simgr_jax import cli
from simgr_jax.compilation import step_report
from simgr_jax.compilation.topology import open_topology
from simgr_jax.compilation.train_step import PlannedRun
from simgr_jax.errors import UserError


def main() -> None:
    cli.required("config")
    num_items = flags.FLAGS.num_items
    if num_items is not None and num_items < 1:
        raise UserError(f"--num_items: {num_items} is not positive; give at least 1, or leave it out")
    topology = open_topology(cli.required("topology"))
    with _workdir() as workdir:
        run = PlannedRun(flags.FLAGS.config, workdir, num_items, topology.devices[0].platform)
        found = step_report.compile_step(run, topology)
    print("\n".join(step_report.lines(found)))
    sys.exit(0 if found.fits else 1)


@contextlib.contextmanager
def _workdir() -> Iterator[Path]:
    if flags.FLAGS.workdir:
        yield cli.open_workdir(flags.FLAGS.workdir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("topology", None, "A slice of TPUs, like v5e:16x16, v5p:4x4x4 or v6e:16x16; or cpu:8.")
    flags.DEFINE_integer("num_items", None, "Assumes a catalog of this many items, without reading data.")
    flags.DEFINE_string(
        "workdir", None, "The folder that keeps prepared data, as for training; a temporary one if left out."
    )
    cli.run(main)
