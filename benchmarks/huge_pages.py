"""Train-step time on a Linux CPU with and without glibc's huge pages, in alternating processes.

Every step allocates tens of megabytes of logits. With 4 KiB pages, much of the step's time goes to page faults.

    python -m benchmarks.huge_pages --config=configs/amazon.py:beauty --config.data.path=DIR

Writes results/huge_pages.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from absl import flags

from benchmarks import record
from benchmarks.train_step import TimedTraining, prepare_run
from simgr_jax import cli

ROUNDS, STEPS = 4, 15
TUNABLES = {"huge_pages": "glibc.malloc.hugetlb=1", "default": "glibc.malloc.hugetlb=0"}


def main() -> None:
    cli.required("config")
    config = flags.FLAGS.config
    if flags.FLAGS.measure:
        run = prepare_run(config)
        training = TimedTraining(run, run.batch_rows, run.windows.row_length)
        print(training.run(STEPS)[1] / STEPS)
        return
    seconds = {name: [] for name in TUNABLES}
    for _ in range(ROUNDS):
        for name, tunables in TUNABLES.items():
            command = [sys.executable, "-m", "benchmarks.huge_pages", *sys.argv[1:], "--measure"]
            environment = os.environ | {"GLIBC_TUNABLES": tunables}
            result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            seconds[name].append(float(result.stdout.splitlines()[-1]))
    figures = {f"{name}_seconds_per_step": statistics.median(values) for name, values in seconds.items()}
    ratios = [without / with_ for without, with_ in zip(seconds["default"], seconds["huge_pages"], strict=True)]
    figures |= {"speedup": statistics.median(ratios), "speedups": ratios}
    print(figures)
    record.write("huge_pages", figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_boolean("measure", False, "Print one measurement. The benchmark calls itself with this flag.")
    cli.run(main)
