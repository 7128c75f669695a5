"""Compares the readouts of shallow and deep backbones from scratch: the paper's and `last_item` (docs/llm_training.md).

    python -m benchmarks.readout --data=DIR [--layers 2 12] [--epochs=10] [--seeds 0] [--workdir=DIR]

DIR holds P5 files. Writes results/readout.json: validation NDCG@10 after each epoch, and the last epoch's coverage@10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import simgr_jax
from benchmarks import record
from simgr_jax import default_config

READOUTS = ("state", "last_item")


def run_config(data: str, layers: int, readout: str, epochs: int, seed: int):
    config = default_config.get_config()
    config.data.update({"format": "p5", "path": data})
    # As in configs/llm.py.
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.semantic_ids.quantizer.update({"name": "residual_kmeans", "levels": 4})
    config.backbone.layers, config.simgr.readout, config.seed = layers, readout, seed
    config.training.update({"epochs": epochs, "patience": epochs, "batch_rows": 8})
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the dataset's folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/readout"))
    args = parser.parse_args()

    figures = {}
    for seed in args.seeds:
        for layers in args.layers:
            for readout in READOUTS:
                name = f"{layers} layers, {readout}, seed {seed}"
                config = run_config(args.data, layers, readout, args.epochs, seed)
                config.cache_dir = str(args.workdir / "cache")
                lines = simgr_jax.fit(config, workdir=args.workdir / name.replace(", ", "-").replace(" ", "_")).log()
                lines = [line for line in lines if "validation/NDCG@10" in line]
                figures[name] = {
                    "NDCG@10": [round(line["validation/NDCG@10"], 4) for line in lines],
                    "coverage@10": round(lines[-1]["validation/coverage@10"], 4),
                }
                config = {"layers": args.layers, "epochs": args.epochs, "data": Path(args.data).name}
                record.write("readout", figures, config, seed=args.seeds[0], without="workdir")
                print(name, figures[name])


if __name__ == "__main__":
    main()
