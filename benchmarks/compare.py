"""Compares models on a dataset and keeps the table as a result.

    python -m benchmarks.compare --config=configs/compare.py:beauty --config.base.data.path=DIR

Runs `simgr_jax.compare` with the same flags in workdirs/compare_DATASET (going on where an earlier call was cut off)
and writes results/compare_DATASET.json and, for people, results/compare_DATASET.md and .png. With configs/scaling.py
these are called scaling_DATASET.
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


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    name = f"{config_file.stem}_{config.base.data.name or config.base.data.format}"
    workdir = Path("workdirs") / name
    command = [sys.executable, "-m", "simgr_jax.compare", *sys.argv[1:], f"--workdir={workdir}"]
    started, comparison = time.time(), workdir / "comparison.json"
    code = subprocess.run(command).returncode
    # Where a model failed, the others' figures are kept all the same, and say so.
    if comparison.exists() and comparison.stat().st_mtime >= started:
        settings = config.to_dict() | {"base": record.settings(config.base)}
        record.write(name, json.loads(comparison.read_text(encoding="utf-8")), settings, config.base.seed)
        picture = "scaling.png" if (workdir / "scaling.png").exists() else "diversity.png"
        for file in ("comparison.md", picture):
            shutil.copyfile(workdir / file, (record.ROOT / "results" / name).with_suffix(Path(file).suffix))
    sys.exit(code)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string(
        "name", None, "Of the result and its workdir, like scaling_beauty; compare_DATASET if left out."
    )
    flags.DEFINE_list("only", [], "Names of the models to train, separated by commas; all if left out.")
    cli.run(main, rows.config_keys)
