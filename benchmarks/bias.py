"""Measures the bias of a comparison's models and keeps it as a result.

    python -m benchmarks.bias --workdir=workdirs/compare_beauty [--users=256]

Runs `simgr_jax.bias` in a workdir of `benchmarks.compare` and writes results/bias_DATASET.json and, for people,
results/bias_DATASET.md and .png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import record
from simgr_jax import cli, run_config


def main() -> None:
    workdir = Path(cli.required("workdir"))
    subprocess.run([sys.executable, "-m", "simgr_jax.bias", *sys.argv[1:]], check=True)
    figures = json.loads((workdir / "bias.json").read_text(encoding="utf-8"))
    configs = {name: run_config.load(workdir / "runs" / name) for name in figures["models"]}
    config = next(iter(configs.values()))
    result = f"bias_{config.data.name or config.data.format}"
    settings = {name: record.settings(config) for name, config in configs.items()}
    record.write(result, figures, settings, config.seed)
    for kind in ("md", "png"):
        shutil.copyfile(workdir / f"bias.{kind}", record.ROOT / "results" / f"{result}.{kind}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of simgr_jax.compare.")
    flags.DEFINE_integer("users", 256, "How many users of the test split are asked about.")
    cli.run(main)
