"""Compares the item encoders by their validation metrics after otherwise equal runs.

    python -m benchmarks.item_encoders --config=configs/amazon.py:instruments --data=DIR [--epochs=8] [--workdir=DIR]

Writes results/item_encoders.json. The defaults in `configs/` are based on it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import record
from simgr_jax.models.item_encoders import ITEM_ENCODERS

KEPT = ("HR@10", "NDCG@10", "coverage@10", "entropy@10", "num_parameters", "train_seconds", "train_targets_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/amazon.py:instruments")
    parser.add_argument("--data", required=True, help="the dataset's folder")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/item_encoders"))
    args = parser.parse_args()

    figures = {}
    for name in ITEM_ENCODERS:
        workdir = args.workdir / name
        train = [
            "simgr_jax.train",
            f"--config={args.config}",
            f"--config.data.path={args.data}",
            f"--workdir={workdir}",
        ]
        train += [f"--config.simgr.item_encoder={name}", f"--config.training.epochs={args.epochs}"]
        for command in (train, ["simgr_jax.evaluate", f"--workdir={workdir}", "--split=validation"]):
            subprocess.run([sys.executable, "-m", *command], check=True)
        metrics = json.loads((workdir / "report_validation" / "metrics.json").read_text(encoding="utf-8"))
        figures[name] = {key: metrics[key] for key in KEPT}
        record.write(
            "item_encoders", figures, {"config": args.config, "epochs": args.epochs, "split": "validation"}, seed=0
        )


if __name__ == "__main__":
    main()
