import json
import os
import shutil
import signal
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import fingerprint, load_arrays

ARRAY = np.arange(6, dtype=np.int32)


@given(hypothesis_numpy.arrays(st.sampled_from([np.int32, np.float32]), hypothesis_numpy.array_shapes(min_side=0)))
def test_the_memory_layout_of_an_array_does_not_count(array):
    mark = fingerprint(array)
    assert len(mark) == 16 and int(mark, 16) >= 0
    assert fingerprint(array.copy()) == mark
    assert fingerprint(np.asfortranarray(array)) == mark


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((ARRAY,), (ARRAY + 1,)),
        ((ARRAY,), (ARRAY.astype(np.int64),)),
        ((ARRAY,), (ARRAY.view(np.float32),)),
        ((ARRAY,), (ARRAY.reshape(2, 3),)),
        ((ARRAY.reshape(2, 3),), (ARRAY.reshape(3, 2),)),
        ((ARRAY,), (ARRAY, None)),
        (("a", "b"), ("ab",)),
        (("a", "b"), ("b", "a")),
        ((1,), ("1",)),
        (({"a": 1},), ({"a": 2},)),
        (([1, 2],), ([2, 1],)),
    ],
)
def test_different_parts_have_different_fingerprints(one, other):
    assert fingerprint(*one) != fingerprint(*other)


def test_the_order_of_keys_does_not_count():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(ml_collections.ConfigDict({"b": (1, 2), "a": 1})) == fingerprint({"a": 1, "b": [1, 2]})


def test_a_file_counts_by_name_and_contents_not_by_folder_or_time(tmp_path):
    def marked(folder, name, content):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return fingerprint(path)

    mark = marked("one", "name", "content")
    assert marked("two", "name", "content") == mark
    os.utime(tmp_path / "one" / "name", (0, 0))
    assert fingerprint(tmp_path / "one" / "name") == mark
    assert marked("two", "other", "content") != mark
    assert marked("two", "name", "contents") != mark


def test_a_folder_counts_by_all_files_below_it(tmp_path):
    def folder(name, files):
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return fingerprint(tmp_path / name)

    mark = folder("a", {"x": "1", "below/y": "2"})
    assert folder("b", {"below/y": "2", "x": "1"}) == mark
    assert folder("c", {"x": "1", "below/y": "3"}) != mark
    assert folder("d", {"x": "1", "below/z": "2"}) != mark
    assert folder("e", {"x": "1", "y": "2"}) != mark
    assert folder("f", {"x": "1"}) != mark
    assert folder("g", {"x": "2", "below/y": "1"}) != mark


def test_a_missing_file_has_no_fingerprint(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "none")


def files(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_appears_only_when_its_block_ends(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert files(path.parent) == {"file": "new"}


def test_the_temporary_path_keeps_the_suffix(tmp_path):
    """np.savez adds .npz to any other name."""
    with atomic_path(tmp_path / "array.npz") as temporary:
        np.savez(temporary, array=ARRAY)
    assert [path.name for path in tmp_path.iterdir()] == ["array.npz"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert files(tmp_path) == {"file": "old"}


def test_an_error_leaves_no_part_of_a_folder(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    (source / "file").write_text("content")
    (source / "no file").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"copy: can't be written .*no file"), atomic_path(copy) as temporary:
        shutil.copytree(source, temporary)
    assert list(tmp_path.iterdir()) == [source]


def test_a_killed_process_leaves_the_old_file_under_its_name(root, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, pathlib, signal, sys\n"
        "from simgr_jax.workdir.atomic_write import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:  # what the killed process left doesn't get in the way
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"can't be written \((Not a directory|File exists)\); choose"):
        with atomic_path(tmp_path / below / "new") as temporary:
            temporary.write_text(json.dumps({}))
    assert files(tmp_path) == {"file": "x"}


def test_a_damaged_file_is_named_with_a_remedy(tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, codes=np.arange(1000))
    assert (load_arrays(path)["codes"] == np.arange(1000)).all()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"codes\.npz: is damaged .*; remove it"):
        load_arrays(path)


def test_no_flipped_byte_of_a_cached_array_is_read_as_another_value(tmp_path):
    """At every place of a small file."""
    path, generator = tmp_path / "cached.npz", np.random.default_rng(0)
    arrays = {"values": np.arange(5000, 5040), "offsets": np.array([0.5, 1.5], np.float32), "texts": np.uint8([65, 66])}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    detected = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            found = load_arrays(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: is damaged") and "remove it" in str(error)
            detected += 1
        else:
            assert found.keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array, strict=True)
    assert detected > len(whole) // 2


def test_a_header_that_asks_for_fewer_numbers_is_damage(tmp_path):
    """NumPy reads as many as it is asked for, and never comes to the checksum."""
    path = tmp_path / "cached.npz"
    np.savez(path, codes=np.arange(5000))
    path.write_bytes(path.read_bytes().replace(b"(5000,)", b"(1000,)"))
    with pytest.raises(UserError, match=r"cached\.npz: is damaged .*; remove it"):
        load_arrays(path)
