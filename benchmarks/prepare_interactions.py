"""Time and memory of preparing a log of 10 million interactions, from CSV through 5-core to leave-one-out.

    python -m benchmarks.prepare_interactions

writes results/prepare_interactions.json. The log (long-tail items, from a seed) is generated first, untimed. A separate
process then prepares it; the figures are its wall time, with imports, and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_collections
import numpy as np
import polars as pl

from benchmarks import record

NUM_USERS, NUM_ITEMS = 1_200_000, 400_000
DAYS = 3650


def generate_log(path: Path, num_interactions: int, seed: int) -> None:
    """Writes `user_id,item_id,timestamp` ordered by time. Users' activity and items' popularity have long tails."""
    rng = np.random.default_rng(seed)
    scale = num_interactions / 10_000_000
    users = _long_tail(rng, max(int(NUM_USERS * scale), 1), num_interactions, exponent=0.5)
    items = _long_tail(rng, max(int(NUM_ITEMS * scale), 1), num_interactions, exponent=0.9)
    # Whole minutes, so that some of a user's timestamps tie.
    minutes = np.sort(rng.integers(0, DAYS * 24 * 60, num_interactions))
    frame = pl.DataFrame({"user": users, "item": items, "timestamp": 1_400_000_000 + 60 * minutes})
    # IDs have 14 and 10 characters, as in Amazon's logs.
    ids = {"user": pl.format("A{}", pl.col("user").cast(pl.String).str.zfill(13))}
    ids["item"] = pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9))
    frame.lazy().select(user_id=ids["user"], item_id=ids["item"], timestamp="timestamp").sink_csv(path)


def _long_tail(rng: np.random.Generator, size: int, count: int, exponent: float) -> np.ndarray:
    """int64 [count], below `size`: draws with probability proportional to rank^-exponent; ranks are shuffled."""
    cumulative = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
    return rng.permutation(size)[np.minimum(ranks, size - 1)]


def prepare(log: Path, cache_dir: Path, k_core: int) -> dict[str, float]:
    """Prepares the log in this process and returns the figures."""
    from simgr_jax.data.load import load

    config = ml_collections.ConfigDict({"format": "log", "path": str(log), "name": "", "k_core": k_core})
    config.split = "leave_one_out"
    config.log = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
    config.log.update({"items_file": "", "items_id": "", "items_text": ()})
    dataset, split = load(config, cache_dir)
    return {
        "users": len(dataset.user_ids),
        "items": dataset.num_items,
        "interactions": len(dataset.sequences.values),
        "train_sequences": len(split.train),
        "test_cases": len(split.test),
        # Linux gives kilobytes. A process inherits its parent's peak, so the log is generated in a separate process.
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=10_000_000)
    parser.add_argument("--k_core", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", choices=("generate", "prepare"), help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "generate":
        generate_log(args.dir / "log.csv", args.interactions, args.seed)
    elif args.step == "prepare":
        print(json.dumps(prepare(args.dir / "log.csv", args.dir / "cache", args.k_core)))
    else:
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    def step(name: str) -> str:
        command = [sys.executable, "-m", "benchmarks.prepare_interactions", *sys.argv[1:], "--step", name]
        return subprocess.run([*command, "--dir", folder], check=True, stdout=subprocess.PIPE, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        step("generate")
        log_bytes = (Path(folder) / "log.csv").stat().st_size
        start = time.perf_counter()
        prepared = json.loads(step("prepare"))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        step("prepare")
        cached_seconds = time.perf_counter() - start
    figures = {
        "seconds": round(seconds, 2),
        "seconds_from_cache": round(cached_seconds, 2),
        "log_mib": round(log_bytes / 2**20, 1),
        **prepared,
    }
    config = {"interactions": args.interactions, "k_core": args.k_core, "format": "log", "split": "leave_one_out"}
    path = record.write("prepare_interactions", figures, config, args.seed)
    print(json.dumps(figures, indent=2), f"written to {path.relative_to(record.ROOT)}", sep="\n")


if __name__ == "__main__":
    main()
