"""Semantic IDs on disk."""

import numpy as np
import pytest

from simgr_jax.errors import UserError
from simgr_jax.semantic_ids import saved_ids
from simgr_jax.semantic_ids.codes import SemanticIds

IDS = SemanticIds(np.array([[0, 4], [1, 3]], np.int32), (2, 5))


def test_read_gives_what_was_written(tmp_path):
    saved_ids.write(tmp_path / "new" / "ids.npz", IDS, {"collisions": 0})
    ids, report = saved_ids.read(tmp_path / "new" / "ids.npz")
    np.testing.assert_array_equal(ids.codes, IDS.codes)
    assert (ids.codes.dtype, ids.codebook_sizes, report) == (np.int32, (2, 5), {"collisions": 0})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ids.json", "ids.npz"]


def test_a_damaged_file_is_named(tmp_path):
    saved_ids.write(tmp_path / "ids.npz", IDS, {})
    (tmp_path / "ids.npz").write_bytes((tmp_path / "ids.npz").read_bytes()[:1])
    with pytest.raises(UserError, match=r"ids\.npz: is damaged"):
        saved_ids.read(tmp_path / "ids.npz")


def test_no_flipped_byte_changes_the_ids_or_their_report(tmp_path):
    """At 200 random places of each file."""
    report, generator = {"collisions": 12, "error": 0.25}, np.random.default_rng(0)
    saved_ids.write(tmp_path / "ids.npz", IDS, report)
    detected = 0
    for file in (tmp_path / "ids.npz", tmp_path / "ids.json"):
        whole = file.read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
            file.write_bytes(damaged)
            try:
                ids, found = saved_ids.read(tmp_path / "ids.npz")
            except UserError:
                detected += 1
            else:
                np.testing.assert_array_equal(ids.codes, IDS.codes)
                assert (ids.codebook_sizes, found) == (IDS.codebook_sizes, report)
        file.write_bytes(whole)
    assert detected > 100
