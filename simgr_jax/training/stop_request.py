"""A request to stop training, made by SIGINT (Ctrl-C) or SIGTERM (a preemption)."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import jax

from simgr_jax.devices import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Several processes agree this often whether one of them was asked to stop.
_SECONDS_BETWEEN_AGREEMENTS = 2.0


class StopRequest:
    """Between `listen` and the end of its context, the first signal is a request that `at` returns. The second does
    what it would have done before `listen`: it ends a binary at once.

    Attributes:
      made: whether this process was asked to stop, or has agreed with others to stop.
    """

    def __init__(self) -> None:
        self.made = False
        self._before: dict[int, Any] = {}
        self._agreed_at: tuple[int, float] | None = None
        self._next_agreement = 0

    def listen(self) -> None:
        """Listens from now on. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # What is ignored stays ignored, as shells do for background jobs; None is a handler of C code.
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)

    def at(self, step: int, state: Any) -> bool:
        """Whether to stop after this step. All processes must call it after every step, and all get the same answer.

        One process knows at once. Several agree about every two seconds, because that waits for the devices.

        Args:
          state: the arrays that the step computes.
        """
        if not distributed.several():
            return self.made
        if step < self._next_agreement:
            return False
        # On CPUs, the exchanges between processes below might otherwise run at the same time as the step's.
        jax.block_until_ready(state)
        now = time.monotonic()
        last_step, last = self._agreed_at or (step, now)
        told = distributed.all_gather([self.made, (now - last) / max(step - last_step, 1)])
        self.made = any(made for made, _ in told)
        seconds_per_step = max(seconds for _, seconds in told)
        # Until a step has been timed, ask again after the next one.
        steps = int(_SECONDS_BETWEEN_AGREEMENTS / seconds_per_step) if seconds_per_step else 1
        self._agreed_at, self._next_agreement = (step, time.monotonic()), step + max(steps, 1)
        return self.made

    def _receive(self, number: int, frame: Any) -> None:
        self.made = True
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *exception) -> None:
        self._restore()
