import pytest


@pytest.mark.parametrize(
    "case", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("items", "texts", "mixers")), "tokens"]
)
def test_on_a_mesh_the_model_learns_and_ranks_as_on_one_device(on_eight_devices, mesh, case):
    on_eight_devices("tests.models.sharded_simgr", case, *mesh)
