"""Trains a recommender and reports on it, from interaction logs to metrics and pictures, in one command.

    python -m simgr_jax.train --config=configs/amazon.py:beauty --config.data.path=DIR --workdir=DIR

To continue a run that was cut off, give the same command again, or --workdir alone.
"""

from __future__ import annotations

from absl import flags

from simgr_jax import cli
from simgr_jax.run import Run
from simgr_jax.workdir.config_file import FILE_NAME


def main() -> None:
    workdir = cli.open_workdir(cli.required("workdir"))
    if flags.FLAGS["config"].value is None and (workdir / FILE_NAME).exists():
        run = Run.load(workdir)
    else:
        cli.required("config")
        run = Run(flags.FLAGS.config, workdir)
    run.train()
    if flags.FLAGS.report:
        run.evaluate("test")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    flags.DEFINE_string("workdir", None, "The folder for the config, checkpoints, metrics and report.")
    flags.DEFINE_bool("report", True, "Whether to report on the test split at the end.")
    cli.run(main)
