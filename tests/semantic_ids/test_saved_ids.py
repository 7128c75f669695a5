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


@pytest.mark.parametrize("name", ["ids.npz", "ids.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    saved_ids.write(tmp_path / "ids.npz", IDS, {})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1])
    with pytest.raises(UserError, match=name):
        saved_ids.read(tmp_path / "ids.npz")
