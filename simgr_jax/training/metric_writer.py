"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricWriter:
    """Writes a line to `workdir/metrics.jsonl` and the TensorBoard events for each `write`, and shows progress.

    On a terminal the progress is a bar (step, loss, targets/s, time left); elsewhere a plain line for each `write`.
    Use as a context manager.
    """

    def __init__(self, workdir: Path, num_steps: int, first_step: int):
        self._num_steps = num_steps
        self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"))
        self._console = Console()
        self._started, self._first_step = time.monotonic(), first_step
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step)
            self._bar.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """scalars: named `part/metric`, like "train/loss" or "validation/NDCG@10"."""
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        text = "  ".join(f"{name.removeprefix('train/')} {_short(value)}" for name, value in scalars.items())
        if self._bar is None:
            done = max(step - self._first_step, 1)
            left = (time.monotonic() - self._started) / done * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {text}  {left / 60:.1f} min left", flush=True, file=sys.stdout)
        elif "train/loss" in scalars:
            speed = scalars["train/targets_per_second"]
            self._bar.update(
                self._task, completed=step, description=f"loss {scalars['train/loss']:.3f}  {speed:,.0f} targets/s"
            )
        else:
            self._bar.console.print(f"step {step}  {text}")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._events.close()
        self._file.close()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
