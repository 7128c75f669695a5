"""What atomic writes do with links, devices, full disks and left-overs. test_cache.py has the rest."""

import errno
import os
import time
import uuid

import pytest

from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import (
    atomic_path,
    is_full_disk,
    one_line_on_a_full_disk,
    remove_leftovers,
    write_text,
)

MAKE_ROOM = "free some space, and give the same command again"


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class LibrarysError(Exception):
    pass


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("there/file")
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new\n"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_link_to_a_file_that_is_not_there_yet_is_written_through(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "later")
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "later").read_text() == "new\n"


@pytest.mark.parametrize("through_link", [False, True])
def test_a_pipe_is_refused_and_stays(tmp_path, through_link):
    """As a device would be, which takes rights to make."""
    path = pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if through_link:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    with pytest.raises(UserError, match=rf"{path.name}: is a device or a pipe, not a file; give the path of a file"):
        write_text(path, "new")
    assert pipe.is_fifo()


def test_a_device_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^/dev/null: is a device or a pipe"), atomic_path(type(tmp_path)("/dev/null")):
        raise AssertionError("it was opened")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        LibrarysError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError) as caught, atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert str(caught.value) == f"{path}: can't be written (No space left on device); {MAKE_ROOM}"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "old"}


def test_a_librarys_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(LibrarysError), atomic_path(tmp_path / "file"):
        raise LibrarysError("ours")
    with pytest.raises(LibrarysError), one_line_on_a_full_disk(tmp_path):
        raise LibrarysError("ours")
    assert not is_full_disk(LibrarysError("ours"))


def test_a_full_disk_behind_a_librarys_error_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught, one_line_on_a_full_disk(tmp_path):
        try:
            full()
        except OSError as error:
            raise LibrarysError("the checkpoint failed") from error
    assert str(caught.value) == f"{tmp_path}: No space left on device; {MAKE_ROOM}"


def test_only_our_old_leftovers_are_removed(tmp_path):
    ours, young = f".{uuid.uuid4().hex}-codes.npz", f".{uuid.uuid4().hex}-split.npz"
    folder = tmp_path / f".{uuid.uuid4().hex}-checkpoints"
    folder.mkdir()
    (folder / "file").touch()
    kept = (".lock", ".bashrc-old", f"{uuid.uuid4().hex}-codes.npz", f".{uuid.uuid4().hex}", "codes.npz", young)
    for name in (ours, *kept):
        (tmp_path / name).touch()
    for name in (ours, folder.name):
        os.utime(tmp_path / name, (time.time() - 100,) * 2)
    remove_leftovers(tmp_path, min_age=50)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept) - {young}
    remove_leftovers(tmp_path / "not there")
