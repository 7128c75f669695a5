"""Compares models on a dataset and records the table.

    python -m benchmarks.compare --config=configs/compare.py:beauty --config.base.data.path=DIR

Runs `simgr_jax.compare` with --config and --only in workdirs/compare_DATASET. If called again, it continues an
interrupted comparison. Writes results/compare_DATASET.json, and a table and a picture as results/compare_DATASET.md and
.png. With configs/scaling.py the name is scaling_DATASET; --name=NAME sets another. The record also has the accuracy
for targets that training has hardly seen (`rare_targets`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks import record
from simgr_jax import cli
from simgr_jax.comparison.rows import COMPARISON_CONFIG, read
from simgr_jax.comparison.runs import Runs, load_finished
from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.significance import paired_difference

# The first of these that exists is recorded.
PICTURES = ("scaling.png", "diversity.png", "accuracy.png")
# As many training interactions are few.
RARE = 5


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    name = flags.FLAGS.name or f"{config_file.stem}_{config.base.data.name or config.base.data.format}"
    workdir = Path("workdirs") / name
    command = [sys.executable, "-m", "simgr_jax.compare", *record.arguments_without("--name"), f"--workdir={workdir}"]
    started, comparison = time.time(), workdir / "comparison.json"
    code = subprocess.run(command).returncode
    # If a model failed, the others' figures are still recorded, and so is the failure.
    if comparison.exists() and comparison.stat().st_mtime >= started:
        settings = config.to_dict() | {"base": record.settings(config.base)}
        figures = json.loads(comparison.read_text(encoding="utf-8"))
        figures["rare_targets"] = rare_targets(config, workdir)
        # Several calls with --only give the same result as one call without it.
        record.write(name, figures, settings, config.base.seed, without="--only")
        picture = next(file for file in PICTURES if (workdir / file).exists())
        for file in ("comparison.md", picture):
            shutil.copyfile(workdir / file, (record.ROOT / "results" / name).with_suffix(Path(file).suffix))
    sys.exit(code)


def rare_targets(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """NDCG@10, the mean over seeds, of the cases whose target has fewer than RARE training interactions, and the paired
    difference from the reference."""
    rows = read(config)
    runs, gains, is_rare = Runs(workdir, config, rows), {}, None
    for row in rows:
        finished = list(runs.finished(row).values())
        if not finished:
            continue
        if is_rare is None:
            run = load_finished(finished[0].workdir, runs.places)
            counts = np.bincount(run.split.train.values, minlength=run.dataset.num_items)
            is_rare, users = counts[run.split.test.targets] < RARE, run.split.test.users
        ranks = [run.saved_ranking().target_rank for run in finished]
        gains[row.name] = np.mean([metrics.gains(one, 10)[is_rare] for one in ranks], axis=0)
    reference = gains.get(config.reference)
    models = {name: {"NDCG@10": float(found.mean())} for name, found in gains.items()}
    for name in gains.keys() - {config.reference} if reference is not None else ():
        models[name]["difference"] = paired_difference(gains[name], reference, users[is_rare])._asdict()
    return {"fewer_interactions_than": RARE, "num_cases": int(np.sum(is_rare)), "models": models}


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_list("only", [], "Names of the models to train, separated by commas; all by default.")
    flags.DEFINE_string("name", None, "The name of the workdir and of the results.")
    cli.run(main, COMPARISON_CONFIG)
