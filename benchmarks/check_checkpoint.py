"""What it costs to check a checkpoint's digests, against restoring it.

    python -m benchmarks.check_checkpoint

writes results/check_checkpoint.json: seconds of a save with its digests, of the digests alone, of the check alone, and
of restoring with its check (medians over rounds in one process), and the megabytes checked per second. The files are in
the system's cache, as after a save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import record
from simgr_jax.training.checkpoints import Checkpoints, Progress
from simgr_jax.training.state import create_state
from simgr_jax.workdir import digests

LAYERS = 16


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def measure(folder: Path, parameters: int, rounds: int, seed: int) -> dict[str, float]:
    """parameters: their number; Adam's moments make it three times as many in a state."""
    rows = max(parameters // LAYERS // 1024, 1)
    model = nnx.State(
        {
            f"layer_{layer}": nnx.Param(jax.random.normal(jax.random.key(seed + layer), (rows, 1024)))
            for layer in range(LAYERS)
        }
    )
    state = create_state(model, optax.adam(1e-3), 0.0)._replace(step=jnp.int32(1))

    def save():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(state, Progress(), None)

    def restore():
        with Checkpoints(folder, read_only=True) as checkpoints:
            return checkpoints.restore_latest(state)[0]

    written, step = seconds(save), folder / "1"
    size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    times: dict[str, list[float]] = {"digests": [], "check": [], "restore": []}
    for _ in range(rounds):
        times["digests"].append(seconds(lambda: digests.write(step, without=["_CHECKPOINT_METADATA", "digests.json"])))
        times["check"].append(seconds(lambda: digests.find_damage(step)))
        times["restore"].append(seconds(restore))
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return {
        "checkpoint_mb": size / 1e6,
        "save_seconds": written,
        **medians,
        "checked_mb_per_second": size / 1e6 / medians["check_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=64_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "checkpoints", args.parameters, args.rounds, args.seed)
    print(figures)
    record.write("check_checkpoint", figures, vars(args), args.seed)


if __name__ == "__main__":
    main()
