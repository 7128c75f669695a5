"""Trains a config and records its test report.

    python -m benchmarks.accuracy --name=beauty --config=configs/amazon.py:beauty --config.data.path=DIR

Runs `simgr_jax.train` with the same flags in workdirs/NAME and writes results/NAME.json. If called again, it continues
an interrupted run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import record
from simgr_jax import cli
from simgr_jax.comparison.runs import SCORE
from simgr_jax.run import Run


def main() -> None:
    cli.required("config")
    name = cli.required("name")
    workdir = Path("workdirs") / name
    train = [sys.executable, "-m", "simgr_jax.train", *record.arguments_without("--name"), f"--workdir={workdir}"]
    if code := subprocess.run(train).returncode:
        sys.exit(code)
    report = json.loads((workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
    figures = dict(report)
    if (ids := workdir / "semantic_ids.json").exists():  # Some models read no semantic IDs.
        figures["semantic_ids"] = json.loads(ids.read_text(encoding="utf-8"))
    log = workdir / "metrics.jsonl"
    if log.exists():  # Models without parameters write no log.
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        figures["validation/NDCG@10"] = max(line[SCORE] for line in lines if SCORE in line)
    config = Run.load(workdir).config
    record.write(name, figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("name", None, "The name of the workdir and of the result.")
    cli.run(main)
