"""One process of a run of tiny_run.py: `python tests/training/tiny_process.py --workdir=DIR [flags]`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jax
import tiny_run
from absl import flags

from simgr_jax import cli
from simgr_jax.devices import sharding
from simgr_jax.training import stop_request
from simgr_jax.training.metric_writer import MetricWriter


def main() -> None:
    values = flags.FLAGS
    if values.kill_at and values.kill_only in (None, values.process_id):
        kill_at(values.kill_at, getattr(signal, values.kill_with))
    # The whole run takes less than the usual time between two agreements to stop.
    stop_request._SECONDS_BETWEEN_AGREEMENTS = 0.0
    config = tiny_run.config(**json.loads(values.training))
    config.mesh.update(json.loads(values.mesh))
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        tiny_run.train(config, Path(values.workdir))


def kill_at(last: int, number: signal.Signals) -> None:
    """Sends the process a signal once, before it logs this step or a later one."""
    write = MetricWriter.write

    def killing(self, step, scalars):
        if step >= last:
            MetricWriter.write = write  # A second signal would end it at once.
            os.kill(os.getpid(), number)
        write(self, step, scalars)

    MetricWriter.write = killing


if __name__ == "__main__":
    cli.define_processes()
    flags.DEFINE_string("workdir", None, "Where the run lives.")
    flags.DEFINE_string("training", "{}", "Changes of config.training, as JSON.")
    flags.DEFINE_string("mesh", "{}", "Changes of config.mesh, as JSON.")
    flags.DEFINE_integer("kill_at", 0, "The step to kill the process at.")
    flags.DEFINE_string("kill_with", "SIGKILL", "The signal to kill it with.")
    flags.DEFINE_integer("kill_only", None, "The only process to kill.")
    cli.run(main)
