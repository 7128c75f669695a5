"""Where a run's numbers go: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.read_files import read_log_line

_FLUSH_SECONDS = 60


class MetricWriter:
    """Each `write` adds a line to `workdir/metrics.jsonl` and TensorBoard events.

    A run that continues from `first_step` repeats later steps, so their old lines are dropped. With several processes,
    only the first one writes. Use as a context manager.

    Logging never stops training. Lines that can't be written, e.g. to a full disk, wait for the next `write`;
    TensorBoard events end with a warning.
    """

    def __init__(self, workdir: Path, first_step: int):
        self._open = contextlib.ExitStack()
        if not distributed.is_main():
            return
        file = workdir / "metrics.jsonl"
        _drop_after(first_step, file)
        self._lines = self._open.enter_context(contextlib.closing(_Lines(file)))
        self._events = self._open.enter_context(contextlib.closing(_Events(workdir / "tensorboard", first_step)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """scalars: by name, `part/metric`, like "train/loss" or "validation/NDCG@10"."""
        if not distributed.is_main():
            return
        self._lines.add(json.dumps({"step": step} | scalars))
        self._events.add(step, scalars)

    def require_written(self) -> None:
        """Checks that every line is in the file. Call it before a checkpoint, because a run that continues from there
        does not write them again.

        Raises:
          UserError: some can't be written.
        """
        if distributed.is_main():
            self._lines.require_written()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()


class _Lines:
    """Lines that are added to a file. If they can't be written, they wait in memory."""

    def __init__(self, path: Path):
        self._path, self._waiting, self._warned = path, b"", False
        self._file = path.open("ab", buffering=0)

    def add(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                _warn("%s: can't be written (%s); its lines wait in memory", self._path, error.strerror)
            self._warned = True

    def require_written(self) -> None:
        try:
            self._write()
        except OSError as error:
            raise UserError(
                f"{self._path}: can't be written ({error.strerror}); mend that, e.g. free some space, and give the "
                "same command again"
            ) from error

    def close(self) -> None:
        # Lines that still wait are later than the latest checkpoint, so a run that continues writes them again.
        with contextlib.suppress(OSError):
            self._write()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


class _Events:
    """TensorBoard events. They are written here and now, because tensorboardX's `SummaryWriter` has a thread that dies
    at a full disk, and then blocks whoever adds an event."""

    def __init__(self, folder: Path, first_step: int):
        # Imports torch where it is installed, which takes seconds.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        self._folder, self._writer, self._flushed = folder, None, 0.0
        with self._or_never_again():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            # TensorBoard hides older events from this step on.
            self._write(first_step + 1, file_version="brain.Event:2")
            self._write(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        with self._or_never_again():
            for name, value in scalars.items():
                self._write(step, summary=self._summary.scalar(name, value))
            if self._writer is not None and time.monotonic() > self._flushed + _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with self._or_never_again():
            if self._writer is not None:
                self._writer.close()

    def _write(self, step: int, **content) -> None:
        if self._writer is not None:
            self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))

    @contextlib.contextmanager
    def _or_never_again(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            _warn("%s: can't be written (%s); the run goes on without TensorBoard events", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                if writer is not None:
                    writer.close()


def _warn(*arguments: object) -> None:
    logging.getLogger(__name__).warning(*arguments)


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
