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


def main() -> None:
    cli.required("config")
    name = cli.required("name")
    workdir = Path("workdirs") / name
    train = [arg for arg in sys.argv[1:] if arg.startswith("--config")]
    subprocess.run([sys.executable, "-m", "simgr_jax.train", *train, f"--workdir={workdir}"], check=True)
    report = json.loads((workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
    ids = json.loads((workdir / "semantic_ids.json").read_text(encoding="utf-8"))
    validation = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max(line["validation/NDCG@10"] for line in validation if "validation/NDCG@10" in line)
    config = run_config.load(workdir)
    figures = report | {"validation/NDCG@10": best, "semantic_ids": ids}
    record.write(name, figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("name", None, "What the workdir and the result are called.")
    cli.run(main)
