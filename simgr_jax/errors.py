"""The exceptions for users' mistakes and for requests to stop, and the text of libraries' exceptions."""

from __future__ import annotations

import os


class UserError(Exception):
    """Bad input from the user: a file, a config key or a flag.

    The message is a single line, `WHERE: what is wrong; what to do`, where WHERE is a file (with its line or key)
    or a config key. The binaries print it on stderr and exit with code 2 (see `simgr_jax.cli`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Stopped(KeyboardInterrupt):
    """A signal asked training to stop. The checkpoint is saved, and the same command continues from it.

    Attributes:
      EXIT_CODE: that of a binary, on which the launch scripts start it again.
    """

    EXIT_CODE = os.EX_TEMPFAIL


def first_line(error: Exception) -> str:
    """The first line of an exception's message, because libraries add long lists; its type's name if that is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
