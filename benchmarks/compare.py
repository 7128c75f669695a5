"""Compares models on a dataset and records the table.

    python -m benchmarks.compare --config=configs/compare.py:beauty --config.base.data.path=DIR

Runs `simgr_jax.compare` with --config and --only in workdirs/compare_DATASET. If called again, it continues an
interrupted comparison. Writes results/compare_DATASET.json, and a table and a picture as results/compare_DATASET.md and
.png. With configs/scaling.py the name is scaling_DATASET; --name=NAME sets another.
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
from simgr_jax.comparison.rows import COMPARISON_CONFIG

# The first of these that exists is recorded.
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
    # If a model failed, the others' figures are still recorded, and so is the failure.
    if comparison.exists() and comparison.stat().st_mtime >= started:
        settings = config.to_dict() | {"base": record.settings(config.base)}
        figures = json.loads(comparison.read_text(encoding="utf-8"))
        # Several calls with --only give the same result as one call without it.
        record.write(name, figures, settings, config.base.seed, without="--only")
        picture = next(file for file in PICTURES if (workdir / file).exists())
        for file in ("comparison.md", picture):
            shutil.copyfile(workdir / file, (record.ROOT / "results" / name).with_suffix(Path(file).suffix))
    sys.exit(code)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_list("only", [], "Names of the models to train, separated by commas; all by default.")
    flags.DEFINE_string("name", None, "The name of the workdir and of the results.")
    cli.run(main, COMPARISON_CONFIG)
