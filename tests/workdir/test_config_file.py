import json

import pytest

from simgr_jax import default_config
from simgr_jax.errors import UserError
from simgr_jax.workdir import config_file


@pytest.fixture
def config():
    config = default_config.get_config()
    config.data.path = "data"
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.optimizer.learning_rate = 1.0  # written as JSON, a float must stay one
    return config


def test_a_saved_config_loads_with_its_types_and_is_locked(config, tmp_path):
    config_file.save(config, tmp_path)
    loaded = config_file.load(tmp_path)
    assert config_file.flat(loaded) == config_file.flat(config)
    types = {key: type(value) for key, value in config_file.flat(loaded).items()}
    assert types == {key: type(value) for key, value in config_file.flat(config).items()}
    assert loaded.semantic_ids.embeddings.names == ("tfidf", "interactions")
    with pytest.raises(AttributeError):
        loaded.new_key = 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_flat_names_every_value_by_its_full_key(config):
    values = config_file.flat(config)
    assert values["seed"] == 0
    assert values["data.path"] == "data"
    assert values["semantic_ids.quantizer.rqvae.hidden_widths"] == (512, 256)
    assert "data" not in values


def test_a_run_resumes_wherever_its_data_is(config, tmp_path):
    config_file.check_same(config, tmp_path)  # there is no run yet
    config_file.save(config, tmp_path)
    config.data.path, config.cache_dir = "elsewhere", "cache"
    config_file.check_same(config, tmp_path)


def test_options_of_other_models_may_differ(config, tmp_path):
    config_file.save(config, tmp_path)
    config.parallel.beam_width, config.sasrec.loss = 7, "binary"
    config_file.check_same(config, tmp_path)
    config.model.name = "parallel"
    config_file.save(config, tmp_path)
    config.parallel.beam_width = 8
    with pytest.raises(UserError, match=r"parallel\.beam_width: the run here has 7, not 8"):
        config_file.check_same(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 7, r"config\.json:seed: the run here has 0, not 7; "),
        ("data.name", "x", r"config\.json:data\.name: the run here has '', not 'x'; "),
        (
            "semantic_ids.embeddings.names",
            ("npy",),
            r"embeddings\.names: the run here has \('tfidf', 'interactions'\), not",
        ),
    ],
)
def test_another_config_is_refused_and_its_key_named(config, tmp_path, key, value, message):
    config_file.save(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        config_file.check_same(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_key_newer_than_the_run_has_its_default(config, tmp_path):
    config_file.save(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["training"]["patience"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_file.load(tmp_path).training.patience == default_config.get_config().training.patience


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: the file is empty"),
        ('{"seed": 0', "config.json:1: not JSON"),
        ("[]", "config.json: has a JSON list instead of an object"),
        (b'{"seed": "\xff"}', "config.json:1: not UTF-8"),
        ('{"sead": 0}', 'config.json: is not this version\'s config (Key "sead" does not exist'),
        ('{"seed": "x"}', "config.json: is not this version's config (Could not override field 'seed'"),
        ('{"data": 3}', "config.json: is not this version's config ("),
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
