"""Times an LLM's training step in float32 and in bfloat16, on this machine.

    python -m benchmarks.computation_dtype --config=llm --config.backbone.checkpoint=DIR [--config.KEY=VALUE ...]

The rounds are interleaved. Writes results/computation_dtype.json: the median of CPU seconds per step, and what
config.backbone.dtype = "auto" is here.
"""

from __future__ import annotations

import time

import jax
import numpy as np
from absl import flags

from benchmarks import record
from benchmarks.train_step import TimedTraining, prepare_run
from simgr_jax import cli
from simgr_jax.config_keys import with_values
from simgr_jax.devices.choose_dtype import choose_dtype

ROUNDS, STEPS = 3, 2
DTYPES = ("float32", "bfloat16")


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    runs = {dtype: prepare_run(with_values(config, {"backbone.dtype": dtype}).lock()) for dtype in DTYPES}
    rows, row_length = runs[DTYPES[0]].batch_rows, runs[DTYPES[0]].windows.row_length
    trainings = {dtype: TimedTraining(run, rows, row_length) for dtype, run in runs.items()}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(ROUNDS):
        for dtype, training in trainings.items():
            began = time.process_time()
            training.run(STEPS)
            seconds[dtype].append((time.process_time() - began) / STEPS)
            print(dtype, seconds[dtype][-1], flush=True)
    figures = {dtype: {"cpu_seconds": round(float(np.median(taken)), 2)} for dtype, taken in seconds.items()}
    size = {"rows": rows, "row_length": row_length, "rounds": ROUNDS, "steps": STEPS}
    record.write("computation_dtype", figures | {"auto": choose_dtype(jax.default_backend())}, size, config.seed)


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
