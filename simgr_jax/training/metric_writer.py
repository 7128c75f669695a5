"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simgr_jax.devices import distributed
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.read_files import read_log_line


class MetricWriter:
    """Each `write` adds a line to `workdir/metrics.jsonl` and TensorBoard events, and shows progress.

    On a terminal the progress is a bar (step, loss, targets/s, time left); elsewhere it is one plain line per `write`.
    A run that continues from `first_step` repeats later steps, so their old lines are dropped. With several processes,
    only the first one writes. Use as a context manager.
    """

    def __init__(self, workdir: Path, num_steps: int, first_step: int):
        self._num_steps = num_steps
        self._open = contextlib.ExitStack()
        if not distributed.is_main():
            return
        from tensorboardX import SummaryWriter  # Imports torch where it is installed, which takes seconds.

        file = workdir / "metrics.jsonl"
        _drop_after(first_step, file)
        self._file = self._open.enter_context(file.open("a", encoding="utf-8"))
        # TensorBoard hides older events from the purge step on.
        self._events = self._open.enter_context(SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1))
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
                # By default Rich forgets speeds after 30 seconds, too soon to estimate the time left of slow steps.
                speed_estimate_period=600,
            )
            self._task = self._bar.add_task("starting", total=num_steps, completed=first_step)
            self._open.enter_context(self._bar)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """scalars: by name, `part/metric`, like "train/loss" or "validation/NDCG@10"."""
        if not distributed.is_main():
            return
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        text = "  ".join(f"{name.removeprefix('train/')} {_short(value)}" for name, value in scalars.items())
        if self._bar is None:
            done = max(step - self._first_step, 1)
            left = (time.monotonic() - self._started) / done * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {text}  {left / 60:.1f} min left", flush=True)
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
        self._open.close()


def _drop_after(step: int, file: Path) -> None:
    """Drops the lines of later steps, and a last line that was cut short.

    Raises:
      UserError: another line can't be read.
    """
    if file.exists():
        *lines, _ = file.read_bytes().split(b"\n")  # Every line that was written to its end has a newline.
        numbered = enumerate(lines, start=1)
        kept = [line for number, line in numbered if read_log_line(line, f"{file}:{number}")["step"] <= step]
        with atomic_path(file) as path:
            path.write_bytes(b"".join(line + b"\n" for line in kept))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
