"""Semantic IDs on disk."""

import numpy as np
import pytest

from simgr_jax.errors import UserError
from simgr_jax.semantic_ids import files
from simgr_jax.semantic_ids.tokenizer import SemanticIds

IDS = SemanticIds(np.array([[0, 4], [1, 3]], np.int32), (2, 5))


def test_what_was_written_is_read(tmp_path):
    files.write(tmp_path / "new" / "ids.npz", IDS, {"collisions": 0})
    ids, report = files.read(tmp_path / "new" / "ids.npz")
    np.testing.assert_array_equal(ids.codes, IDS.codes)
    assert (ids.codes.dtype, ids.codebook_sizes, report) == (np.int32, (2, 5), {"collisions": 0})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ids.json", "ids.npz"]


@pytest.mark.parametrize("name", ["ids.npz", "ids.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    files.write(tmp_path / "ids.npz", IDS, {})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1])
    with pytest.raises(UserError, match=name):
        files.read(tmp_path / "ids.npz")
