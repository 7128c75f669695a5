"""The lock on a folder."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest

from simgr_jax.errors import UserError
from simgr_jax.workdir import lock
from simgr_jax.workdir.lock import locked

HOLDS = """
import pathlib, sys, time
from simgr_jax.workdir.lock import locked
with locked(pathlib.Path(sys.argv[1]), "a run is training"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(root, tmp_path):
    """A process that holds the lock of tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], cwd=root, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    who = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError) as caught, locked(tmp_path, "a run is training"):
        raise AssertionError("two are in")
    message = f"{tmp_path}: a run is training in it already ({who}); wait for it, or choose another --workdir"
    assert str(caught.value) == message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process_however_that_ends(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with locked(tmp_path, "a run is training"):
        assert (tmp_path / lock.FILE_NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_two_runs_of_one_process_exclude_each_other_as_well(tmp_path):
    with locked(tmp_path, "first"):
        with pytest.raises(UserError, match="second in it already"), locked(tmp_path, "second"):
            raise AssertionError("two are in")
    with locked(tmp_path, "third"):
        pass


def test_an_error_in_the_block_is_not_the_locks(tmp_path):
    with pytest.raises(BlockingIOError), locked(tmp_path, "a run is training"):
        raise BlockingIOError
    with locked(tmp_path, "a run is training"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path, "a run is training"):
        pass
    assert caplog.messages == [
        f"{tmp_path}: its file system has no locks (No locks available); start only one process in it"
    ]


def test_a_folder_that_cant_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/\.lock: can't be written \(Not a directory\); choose another --workdir"):
        with locked(tmp_path / "file", "a run is training"):
            raise AssertionError("it is locked")
