"""A lock on a folder that only one process at a time may work in."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from simgr_jax.errors import UserError

FILE_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, work: str, flag: str = "--workdir") -> Iterator[None]:
    """Locks the folder during the block. The lock ends with the process, however it ends. Reading needs no lock.

    The file `folder/.lock` stays, because another process may already wait at it. It says who locked it last.

    Args:
      work: what is done in the folder, like "a run is training", for the message.
      flag: what names the folder.

    Raises:
      UserError: another process, of this or another machine, has locked the folder; or its lock can't be written.
    """
    path = folder / FILE_NAME
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another {flag}") from error
    with file:
        try:
            # Over NFS, Linux makes of this a lock that all machines see.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise UserError(
                f"{folder}: {work} in it already ({owner}); wait for it, or choose another {flag}"
            ) from error
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: its file system has no locks (%s); start only one process in it", folder, error.strerror
            )
        with contextlib.suppress(OSError):  # On a full disk the lock still holds.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
