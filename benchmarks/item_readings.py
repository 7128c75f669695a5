"""How well an LLM's readings of item texts (`huggingface.item_reader`) tell by themselves what is bought next.

    python -m benchmarks.item_readings --checkpoint=DIR --data=DIR [--depths .03 .25 .5 .75 1] [--workdir=DIR]

Nothing is trained: the catalog is ranked by the similarity of each item's reading to the history's. An item counts
DECAY times as much as the next one; at decay 0 only the last item counts. DATA holds P5 files. Writes
results/item_readings.json: validation NDCG@10 by depth, whitening and decay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks import record
from simgr_jax import default_config
from simgr_jax.run import Run

WHITENINGS = (0.0, 0.5, 1.0)
DECAYS = (0.0, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the LLM's folder")
    parser.add_argument("--data", required=True, help="the dataset's folder")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.03, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/item_readings"))
    args = parser.parse_args()

    figures = {}
    for depth in args.depths:
        for whitening in WHITENINGS:
            config = default_config.get_config()
            config.data.update({"format": "p5", "path": args.data})
            config.item_reader.update({"checkpoint": args.checkpoint, "depth": depth, "whitening": whitening})
            config.cache_dir = str(args.workdir / "cache")
            run = Run(config, args.workdir)
            found = {f"decay {decay}": ndcg(run, decay) for decay in DECAYS}
            figures[f"depth {depth}, whitening {whitening}"] = found
            print(depth, whitening, found, flush=True)
    config = {"checkpoint": Path(args.checkpoint).name, "data": Path(args.data).name, "depths": args.depths}
    record.write("item_readings", figures, config, seed=0, without="workdir")


def ndcg(run: Run, decay: float) -> float:
    """Validation NDCG@10, with history items left in. decay: of an item's weight with each item bought since."""
    readings, cases = run.item_readings, run.split.validation
    gains = []
    for history, target in zip(cases.histories, cases.targets, strict=True):
        weights = np.power(decay, np.arange(len(history))[::-1])
        scores = readings @ (weights @ readings[history])
        # A tie counts as the mean of its ranks.
        rank = np.sum(scores > scores[target]) + (np.sum(scores == scores[target]) - 1) / 2
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0)
    return round(float(np.mean(gains)), 4)


if __name__ == "__main__":
    main()
