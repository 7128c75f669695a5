"""Standard output that can't be written, e.g. to `| head -1` or a full disk, never ends a program."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def never_fails() -> Iterator[None]:
    """Within the block, what can't be printed is dropped, after one warning."""
    before = sys.stdout
    if before is None or isinstance(before, _Forgiving):  # Python has None for a standard output that is closed.
        yield
        return
    sys.stdout = forgiving = _Forgiving(before)
    try:
        yield
    finally:
        forgiving.flush()
        sys.stdout = before


class _Forgiving:
    """A text file, except that errors of the system do not leave `write` and `flush`."""

    def __init__(self, file: IO[str]):
        self._file, self._warned = file, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._file.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                logging.getLogger(__name__).warning(
                    "standard output: can't be written (%s); what is printed from here on is lost", error.strerror
                )
            # Python writes what is still buffered when it ends, and would fail again.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._file.fileno())
                os.close(nowhere)
