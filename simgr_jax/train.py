"""Trains a recommender and reports on it, from interaction logs to metrics and pictures, in one command.

    python -m simgr_jax.train --config=configs/amazon.py:beauty --config.data.path=DIR --workdir=DIR

A run that was cut off goes on from its latest checkpoint when the same command is given again.
"""

from __future__ import annotations

import json

from absl import flags
from flax import nnx

from simgr_jax import cli, run_config
from simgr_jax.cache import atomic_path
from simgr_jax.evaluation.judge import judge
from simgr_jax.preparation import cache_dir, prepare
from simgr_jax.training.loop import fit

FLAGS = flags.FLAGS


def main() -> None:
    config, workdir = cli.required("config") and FLAGS.config, cli.open_workdir(cli.required("workdir"))
    run_config.save(config, workdir)

    prepared = prepare(config, workdir)
    with atomic_path(workdir / "semantic_ids.json") as path:
        path.write_text(json.dumps(prepared.id_quality, indent=2) + "\n", encoding="utf-8")
    dataset, split = prepared.dataset, prepared.split
    print(
        f"{dataset.name}: {len(dataset.user_ids):,} users, {dataset.num_items:,} items, "
        f"{len(dataset.sequences.values):,} interactions; {prepared.num_parameters:,} parameters"
    )

    fitted = fit(prepared.model, split, config, prepared.ranker, workdir)

    _, _, catalog = nnx.split(prepared.model, nnx.Param, ...)
    ranking = prepared.ranker(fitted.params, catalog, split.test)
    judge(
        workdir / "report",
        config,
        dataset,
        split,
        ranking.target_rank,
        ranking.items,
        model=config.model.name,
        num_parameters=prepared.num_parameters,
        train_seconds=fitted.seconds,
        train_targets_per_second=fitted.targets_per_second,
        cache=cache_dir(config, workdir),
        metrics_file=workdir / "metrics.jsonl",
    )


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Where the run lives: config, checkpoints, metrics, report.")
    cli.run(main)
