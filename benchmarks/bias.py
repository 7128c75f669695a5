"""Measures the decoding bias of a comparison's models and records it.

    python -m benchmarks.bias --workdir=workdirs/compare_beauty [--users=256]

Runs `simgr_jax.bias` with the same flags in a workdir of `benchmarks.compare`. Writes results/bias_DATASET.json, and a
table and a picture as results/bias_DATASET.md and .png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from benchmarks import record
from simgr_jax import cli
from simgr_jax.bias import define_flags
from simgr_jax.run import Run


def main() -> None:
    workdir = cli.required_path("workdir")
    if code := subprocess.run([sys.executable, "-m", "simgr_jax.bias", *sys.argv[1:]]).returncode:
        sys.exit(code)
    figures = json.loads((workdir / "bias.json").read_text(encoding="utf-8"))
    configs = {name: Run.load(workdir / "runs" / name).config for name in figures["models"]}
    config = next(iter(configs.values()))
    result = f"bias_{config.data.name or config.data.format}"
    settings = {name: record.settings(config) for name, config in configs.items()}
    record.write(result, figures, settings, config.seed)
    for kind in ("md", "png"):
        if (workdir / f"bias.{kind}").exists():
            shutil.copyfile(workdir / f"bias.{kind}", record.ROOT / "results" / f"{result}.{kind}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
