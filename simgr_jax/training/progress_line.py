"""What training does, in the terminal: a bar there, elsewhere plain lines, at least one every 30 seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from simgr_jax import standard_output
from simgr_jax.devices import distributed

SECONDS = 28.0  # With a look every second, the user sees a line within 30.
_SECONDS_BETWEEN_LOOKS = 1.0


class ProgressLine:
    """Shows the step, its epoch, the mean loss since the last line, targets per second, and the time left; before the
    first step, what the run prepares.

    A thread looks every second whether a line is due: the first when the first step has ended, another after SECONDS of
    silence. It asks which steps the device has ended and waits for none, so it delays no step. With several processes,
    only the first one prints. Progress that can't be printed ends with a warning. Use as a context manager.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.RLock()
        # What goes on, if that isn't a step, since when, and how long the last of these took.
        self._activity, self._since, self._took = "", clock(), 0.0
        self._validations: list[float] = []  # Seconds.
        self._running: deque[tuple[int, Mapping[str, jax.Array]]] = deque()
        self._bar: Progress | None = None
        self._thread: threading.Thread | None = None
        self._ended, self._open = threading.Event(), contextlib.ExitStack()
        self._num_steps, self._said = 0, clock()

    def begin(self, step: int, num_steps: int, steps_per_epoch: int, evaluate_every: int) -> None:
        """Training begins now, after this step.

        Args:
          evaluate_every: steps from one validation to the next.
        """
        with self._lock:
            self._num_steps, self._steps_per_epoch, self._evaluate_every = num_steps, steps_per_epoch, evaluate_every
            self._first = self._step = self._shown = step
            self._began = self._shown_at = self._clock()
            self._losses: list[float] = []
            self._targets = 0
            if distributed.is_main() and (console := Console()).is_terminal:
                columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")
                self._bar = self._open.enter_context(Progress(*columns, console=console))
                self._task = self._bar.add_task("starting", total=num_steps, completed=step)

    def started(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """A step was given to the device. scalars: what it computes, with `loss` and `targets`."""
        with self._lock:
            self._running.append((step, scalars))

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Something other than steps goes on during the block, like "validating". It is said if it takes long."""
        with self._lock:
            self._activity, self._since = activity, self._clock()
        try:
            yield
        finally:
            with self._lock:
                now = self._clock()
                self._activity, self._since, self._took = "", now, now - self._since
                if self._num_steps:  # So that speeds are those of the steps alone.
                    self._began, self._shown_at = self._began + self._took, self._shown_at + self._took

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was just done has given the metrics of the validation split, by name."""
        self._validations.append(self._took)
        values = "  ".join(f"validation/{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self._place(step)}  {values}")

    def show(self) -> None:
        """A line about the newest step that has ended; nothing if there was one."""
        with self._lock:
            self._count_ended()
            if self._step == self._shown:
                return
            now = self._said = self._clock()
            loss = f"loss {np.mean(self._losses):.4g}" if self._losses else "loss not finite"
            speed = f"{self._targets / max(now - self._shown_at, 1e-9):,.0f} targets/s"
            text = f"{loss}  {speed}  {duration(self.seconds_left())} left"
            if self._bar is None:
                self.say(f"{self._place(self._step)}  {text}")
            else:
                self._bar.update(self._task, completed=self._step, description=text)
            self._shown, self._shown_at, self._losses, self._targets = self._step, now, [], 0

    def look(self) -> None:
        """Prints a line if one is due."""
        with self._lock:
            is_silent = self._clock() - self._said >= SECONDS
            if self._num_steps:
                self._count_ended()
                if is_silent or self._bar is not None or self._shown == self._first:
                    self.show()
            if is_silent and self._clock() - self._said >= SECONDS:
                self._say_what_goes_on()

    def _say_what_goes_on(self) -> None:
        activity, since, left = self._activity or "preparing", self._since, ""
        if self._num_steps:
            if not self._activity:
                activity, since = f"step {self._step + 1}/{self._num_steps}", self._shown_at
            if self._step > self._first:
                left = f"  {duration(self.seconds_left())} left"
        self.say(f"{activity}: {duration(self._clock() - since)} so far{left}")

    def seconds_left(self) -> float:
        """The time that is left for steps and validations, at their mean speed in this process so far."""
        done, left = self._step - self._first, self._num_steps - self._step
        now = self._since if self._activity else self._clock()
        steps = (now - self._began) / max(done, 1) * left
        validations = np.mean(self._validations or [0.0]) * -(-left // self._evaluate_every)
        return float(steps + validations)

    def say(self, text: str) -> None:
        """Prints a line."""
        with self._lock:
            self._said = self._clock()
            if self._bar is not None:
                self._bar.console.print(text)
            elif distributed.is_main():
                print(text, flush=True)

    def _place(self, step: int) -> str:
        epochs, epoch = (-(-number // self._steps_per_epoch) for number in (self._num_steps, step))
        return f"step {step}/{self._num_steps}  epoch {epoch}/{epochs}"

    def _count_ended(self) -> None:
        """Counts the steps that the device has ended."""
        while self._running and self._running[0][1]["loss"].is_ready():
            self._step, scalars = self._running.popleft()
            if np.isfinite(loss := float(scalars["loss"])):
                self._losses.append(loss)
                self._targets += int(scalars["targets"])

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()

    def __enter__(self) -> ProgressLine:
        if distributed.is_main():
            self._open.enter_context(standard_output.never_fails())
            self._thread = threading.Thread(target=self._look_again_and_again, name="progress line")
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        # First the thread ends, so that it uses nothing that is closed.
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._open.close()


def duration(seconds: float) -> str:
    """Like "45 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
