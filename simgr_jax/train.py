"""Trains a recommender and reports on it, from interaction logs to metrics and pictures, in one command.

    python -m simgr_jax.train --config=configs/amazon.py:beauty --config.data.path=DIR --workdir=DIR

A run that was cut off goes on from its latest checkpoint when the same command is given again, or --workdir alone.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections
from absl import flags
from rich.console import Console

from simgr_jax import cli, distributed, run_config, trained_on
from simgr_jax.evaluate import report_run
from simgr_jax.models import parameters
from simgr_jax.preparation import Prepared, open_mesh, prepare
from simgr_jax.training.loop import fit


def main() -> None:
    config, workdir = _config(), cli.open_workdir(cli.required("workdir"))
    train(config, workdir, flags.FLAGS.report)


def _config() -> ml_collections.ConfigDict:
    """The config that was given, or the workdir's."""
    if flags.FLAGS["config"].value is None and flags.FLAGS.workdir:
        workdir = cli.required_path("workdir")
        if (workdir / run_config.FILE_NAME).exists():
            return run_config.load(workdir)
    cli.required("config")
    return flags.FLAGS.config


def train(config: ml_collections.ConfigDict, workdir: Path, reports: bool = True) -> None:
    """Trains a config in a workdir, going on where a run of it was cut off.

    Args:
      reports: whether the test split is reported on at the end.

    Raises:
      UserError: the workdir holds a run of another config or other data, or the config can't be trained.
    """
    run_config.check_same(config, workdir)
    with open_mesh(config):
        _train(config, workdir, prepare(config, workdir), reports)


def _train(config: ml_collections.ConfigDict, workdir: Path, prepared: Prepared, reports: bool) -> None:
    data = (prepared.dataset, prepared.semantic_ids, prepared.prompt, prepared.split.train)
    trained_on.check(*data, workdir)
    if distributed.is_main():
        # Only now, so that a config that can't be prepared may be corrected in the same workdir.
        run_config.save(config, workdir)
        trained_on.save(config.model.name, *data, prepared.id_quality, workdir)
    dataset = prepared.dataset
    print(
        f"{dataset.name}: {len(dataset.user_ids):,} users, {dataset.num_items:,} items, "
        f"{len(dataset.sequences.values):,} interactions",
        flush=True,
    )
    Console().print(parameters.table(prepared.model))
    fit(prepared.model, prepared.split, prepared.prompt, config, prepared.ranker, workdir)
    if reports:
        report_run(config, workdir, prepared, "test")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    flags.DEFINE_string("workdir", None, "Where the run lives: config, checkpoints, metrics, report.")
    flags.DEFINE_bool("report", True, "Whether the test split is reported on at the end.")
    cli.run(main)
