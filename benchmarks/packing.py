"""Targets trained per second with packed and with padded rows.

Both have the same model and the same number of positions per batch, and alternate in one run.

    python -m benchmarks.packing --config=configs/amazon.py:beauty --config.data.path=DIR

Writes results/packing.json.
"""

from __future__ import annotations

import statistics

from absl import flags

from benchmarks import record
from benchmarks.train_step import TimedTraining, prepare_run
from simgr_jax import cli

ROUNDS, STEPS = 8, 10


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    run = prepare_run(config)
    rows, row_length = run.batch_rows, run.windows.row_length
    longest = min(row_length, run.prompt.longest(config.data.max_items))
    shapes = {"packed": (rows, row_length, None), "padded": (rows * row_length // longest, longest, 1)}
    trainings = {name: TimedTraining(run, *shape) for name, shape in shapes.items()}
    speeds, fill = {name: [] for name in shapes}, {}
    for _ in range(ROUNDS):
        for name, training in trainings.items():
            targets, seconds = training.run(STEPS)
            speeds[name].append(targets / seconds)
            fill[name] = targets / (STEPS * training.max_targets)
    ratios = [packed / padded for packed, padded in zip(speeds["packed"], speeds["padded"], strict=True)]
    figures = {f"{name}_targets_per_second": statistics.median(values) for name, values in speeds.items()}
    figures |= {f"{name}_fill": share for name, share in fill.items()}
    figures |= {"ratio": statistics.median(ratios), "ratios": ratios}
    print(figures)
    record.write("packing", figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
