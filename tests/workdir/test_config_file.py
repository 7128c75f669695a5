import json

import pytest

from simgr_jax.errors import UserError
from simgr_jax.workdir import config_file

VALUES = {"seed": 0, "data": {"path": "data"}, "semantic_ids": {"embeddings": {"names": ("tfidf", "interactions")}}}
# Written as JSON, a float must stay one.
VALUES |= {"optimizer": {"learning_rate": 1.0}}


def test_a_saved_config_loads_with_its_types(tmp_path):
    config_file.save(VALUES, tmp_path)
    loaded = config_file.load(tmp_path)
    assert loaded == VALUES
    assert type(loaded["optimizer"]["learning_rate"]) is float
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_file_begins_with_the_version(tmp_path):
    config_file.save(VALUES, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert next(iter(values.items())) == ("config_version", config_file.VERSION)


@pytest.mark.parametrize("version", [1, None, config_file.VERSION + 1])
def test_another_version_is_refused(tmp_path, version):
    """The first version wrote none."""
    values = {"seed": 0} if version is None else {"config_version": version, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        config_file.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/config.json: is of config version {version or 1}, and this simgr_jax reads version "
        f"{config_file.VERSION}; use the simgr_jax that trained it, or train in a new workdir"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: the file is empty"),
        ('{"seed": 0', "config.json:1: not JSON"),
        ("[]", "config.json: has a JSON list instead of an object"),
        (b'{"seed": "\xff"}', "config.json:1: not UTF-8"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        config_file.load(tmp_path)
    assert f"{tmp_path}/{message}" in str(caught.value)
    assert "; " in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: is not there; give the --workdir of a run"):
        config_file.load(tmp_path)
