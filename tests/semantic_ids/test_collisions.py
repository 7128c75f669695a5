"""Items that share an ID."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simgr_jax.semantic_ids import collisions, quality

CODES = hnp.arrays(np.int32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(0, 3))


@settings(max_examples=50, deadline=None)
@given(CODES)
def test_disambiguated_ids_are_unique_and_start_with_the_originals(codes):
    sizes = (4,) * codes.shape[1]
    longer, longer_sizes = collisions.add_disambiguating_level(codes, sizes)
    np.testing.assert_array_equal(longer[:, :-1], codes)
    assert len({tuple(row) for row in longer.tolist()}) == len(codes)
    assert longer_sizes[:-1] == sizes
    assert longer[:, -1].max() == longer_sizes[-1] - 1
    seen = {}
    for row, last in zip(map(tuple, codes.tolist()), longer[:, -1], strict=True):
        assert last == seen.get(row, 0)  # 0, 1, 2, ... in item order
        seen[row] = last + 1


@settings(max_examples=50, deadline=None)
@given(CODES)
def test_groups_are_equal_exactly_where_codes_are(codes):
    group = collisions.groups(codes)
    assert group.dtype == np.int32
    same_codes = (codes[:, None] == codes[None]).all(-1)
    np.testing.assert_array_equal(group[:, None] == group[None], same_codes)


def test_quality_report_counts_collisions_and_codes():
    codes = np.array([[0, 1], [0, 1], [0, 2], [1, 0], [0, 1]], np.int32)
    embeddings = np.array([[0.0], [0.0], [2.0], [4.0], [4.0]])
    reconstruction = np.array([[0.0], [0.0], [2.0], [4.0], [2.0]])
    report = quality.report(codes, (4, 4), embeddings, reconstruction)
    assert report["num_items"] == 5
    assert report["levels"] == 2
    assert report["distinct_ids"] == 3
    assert report["collisions"] == 2
    assert report["items_sharing"] == 3
    assert report["collision_rate"] == 0.6
    assert report["largest_group"] == 3
    assert report["codes_used"] == [0.5, 0.75]
    np.testing.assert_allclose(report["perplexity"][0], 0.8**-0.8 * 0.2**-0.2)
    np.testing.assert_allclose(report["relative_mse"], 4 / 16)


def test_quality_report_without_embeddings_has_no_error():
    assert quality.report(np.zeros((3, 2), np.int32), (1, 1))["relative_mse"] is None
