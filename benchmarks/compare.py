"""Compares models on a dataset and keeps the table as a result.

    python -m benchmarks.compare --config=configs/compare.py:beauty --config.base.data.path=DIR

Runs `simgr_jax.compare` with --config and --only in workdirs/compare_DATASET (going on where a call was cut off)
and writes results/compare_DATASET.json and, for people, results/compare_DATASET.md and .png. With configs/scaling.py
these are called scaling_DATASET, and --name=NAME calls them something else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from benchmarks import record
from simgr_jax import cli
from simgr_jax.comparison import rows

# The best there is of them is kept.
PICTURES = ("scaling.png", "diversity.png", "accuracy.png")


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    name = flags.FLAGS.name or f"{config_file.stem}_{config.base.data.name or config.base.data.format}"
    workdir = Path("workdirs") / name
    command = [sys.executable, "-m", "simgr_jax.compare", *record.arguments_without("--name"), f"--workdir={workdir}"]
    started, comparison = time.time(), workdir / "comparison.json"
    code = subprocess.run(command).returncode
    # Where a model failed, the others' figures are kept all the same, and say so.
    if comparison.exists() and comparison.stat().st_mtime >= started:
        settings = config.to_dict() | {"base": record.settings(config.base)}
        figures = json.loads(comparison.read_text(encoding="utf-8"))
        # However often it was called for some of the rows: without --only it trains them all.
        record.write(name, figures, settings, config.base.seed, without="--only")
        picture = next(file for file in PICTURES if (workdir / file).exists())
        for file in ("comparison.md", picture):
            shutil.copyfile(workdir / file, (record.ROOT / "results" / name).with_suffix(Path(file).suffix))
    sys.exit(code)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_list("only", [], "Names of the models to train, separated by commas; all if left out.")
    flags.DEFINE_string("name", None, "What the workdir and the results are called.")
    cli.run(main, rows.config_keys)
