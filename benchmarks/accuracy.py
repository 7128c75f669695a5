"""Trains a config and keeps its test report as a result.

    python -m benchmarks.accuracy --name=beauty --config=configs/amazon.py:beauty --config.data.path=DIR

Runs `simgr_jax.train` with the same flags in workdirs/NAME (going on where an earlier call was cut off) and writes
results/NAME.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import record
from simgr_jax import cli, run_config
from simgr_jax.comparison.runs import SCORE


def main() -> None:
    cli.required("config")
    name = cli.required("name")
    workdir = Path("workdirs") / name
    train = [sys.executable, "-m", "simgr_jax.train", *record.arguments_without("--name"), f"--workdir={workdir}"]
    if code := subprocess.run(train).returncode:
        sys.exit(code)
    report = json.loads((workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
    ids = json.loads((workdir / "semantic_ids.json").read_text(encoding="utf-8"))
    figures = report | {"semantic_ids": ids}
    log = workdir / "metrics.jsonl"
    if log.exists():  # There is none of a model without parameters.
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        figures["validation/NDCG@10"] = max(line[SCORE] for line in lines if SCORE in line)
    config = run_config.load(workdir)
    record.write(name, figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("name", None, "What the workdir and the result are called.")
    cli.run(main)
