import pytest


@pytest.mark.slow
def test_on_a_mesh_the_model_learns_and_searches_as_on_one_device(on_eight_devices):
    on_eight_devices("tests.models.sharded_lcrec")
