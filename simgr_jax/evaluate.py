"""Judges a trained model, or anybody's recommendations, by one code: metrics, intervals, slices, pictures.

    python -m simgr_jax.evaluate --workdir=DIR                                  a run of simgr_jax.train
    python -m simgr_jax.evaluate --predictions=FILE --config=configs/amazon.py:beauty --config.data.path=DIR

A predictions file has a line for each user, best item first: {"user": "A1", "items": ["B7", "B2", ...]}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from simgr_jax import cli, distributed
from simgr_jax.data.dataset import Dataset, Split
from simgr_jax.data.load import oracle_folder
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions, ranking_file
from simgr_jax.evaluation.metrics import LIST_LENGTH
from simgr_jax.evaluation.references import reference_rankings
from simgr_jax.evaluation.report import collect_metrics, write_report
from simgr_jax.files import read_text
from simgr_jax.models import parameters
from simgr_jax.ops.top_k import Ranking
from simgr_jax.preparation import Prepared, cache_dir, load_data, open_mesh, prepare, restore_best

SPLITS = ("validation", "test")


def main() -> None:
    values = flags.FLAGS
    if values.split not in SPLITS:
        raise UserError(f'--split: "{values.split}" is unknown; choose one of {", ".join(SPLITS)}')
    if bool(values.workdir) == bool(values.predictions):
        raise UserError("--workdir, --predictions: give one of the two")
    if values.workdir:
        if flags.FLAGS["config"].value is not None:
            raise UserError("--config: a workdir has its own config; leave this out")
        config, workdir = cli.open_run()
        with open_mesh(config):
            report_run(config, workdir, prepare(config, workdir), values.split)
    elif places := cli.places():
        raise UserError(f"--predictions: is judged on the data of --config; give --config.{next(iter(places))}")
    elif distributed.is_main():
        cli.required("config")
        report_predictions(values.config, cli.required_path("predictions"), values.split)


def report_run(config: ml_collections.ConfigDict, workdir: Path, prepared: Prepared, split: str) -> None:
    """Reports on the best checkpoint of a run, into `workdir/report` (test) or `workdir/report_validation`."""
    params, rest, cost = restore_best(prepared, workdir)
    ranking = prepared.ranker(params, rest, getattr(prepared.split, split))
    if not distributed.is_main():
        return
    facts = {"model": config.model.name, "num_parameters": parameters.total(prepared.model), **cost}
    is_trained = len(jax.tree.leaves(params)) > 0  # Popularity and neighbors have no log.
    log = _read_log(workdir / "metrics.jsonl") if is_trained else []
    folder = workdir / ("report" if split == "test" else f"report_{split}")
    _report(config, cache_dir(config, workdir), folder, prepared.dataset, prepared.split, split, ranking, facts, log)


def _read_log(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: is not JSON ({error}); remove the line") from error
    return lines


def report_predictions(config: ml_collections.ConfigDict, file: Path, split: str) -> None:
    """Reports on another system's recommendations, into the folder `FILE.report` beside the file."""
    folder = file.with_name(f"{file.name}.report")
    cache = cache_dir(config, folder)
    dataset, splits = load_data(config, cache)
    items, target_rank = predictions.read(file, dataset, getattr(splits, split))
    ranking = Ranking(items, np.zeros(items.shape, np.float32), target_rank)
    unknown = dict.fromkeys(("num_parameters", "train_seconds", "train_targets_per_second"))
    _report(config, cache, folder, dataset, splits, split, ranking, {"model": file.stem, **unknown}, [])


def _report(
    config: ml_collections.ConfigDict,
    cache: Path,
    folder: Path,
    dataset: Dataset,
    splits: Split,
    split: str,
    ranking: Ranking,
    facts: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    cases = getattr(splits, split)
    rankings = {"model": ranking, **reference_rankings(dataset, splits, cases, oracle_folder(config.data, cache))}
    facts |= {
        "dataset": dataset.name,
        "split": split,
        "num_users": len(np.unique(cases.users)),
        "num_cases": len(cases),
        "num_items": dataset.num_items,
    }
    metrics = collect_metrics(facts, rankings, cases.users, dataset.num_items)
    write_report(folder, metrics, rankings, cases, splits.train, log)
    ranking_file.write(folder, ranking, cases)
    print(f"{LIST_LENGTH} recommendations for each of {len(cases):,} cases judged; the report is in {folder}")


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_run()
    flags.DEFINE_string("predictions", None, "A JSONL file of recommendations, judged on the data of --config.")
    flags.DEFINE_string("split", "test", "Which part is asked about: validation or test.")
    cli.run(main)
