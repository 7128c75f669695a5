import json

import pytest

from simgr_jax import default_config, run_config
from simgr_jax.errors import UserError


@pytest.fixture
def config():
    config = default_config.get_config()
    config.data.path = "data"
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.optimizer.learning_rate = 1.0  # written as JSON, a float must stay one
    return config


def test_what_is_saved_is_loaded_again_with_its_types_and_locked(config, tmp_path):
    run_config.save(config, tmp_path)
    loaded = run_config.load(tmp_path)
    assert run_config.flat(loaded) == run_config.flat(config)
    types = {key: type(value) for key, value in run_config.flat(loaded).items()}
    assert types == {key: type(value) for key, value in run_config.flat(config).items()}
    assert loaded.semantic_ids.embeddings.names == ("tfidf", "interactions")
    with pytest.raises(AttributeError):
        loaded.new_key = 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_flat_names_every_value_by_its_full_key(config):
    values = run_config.flat(config)
    assert values["seed"] == 0
    assert values["data.path"] == "data"
    assert values["semantic_ids.quantizer.rqvae.hidden_widths"] == (512, 256)
    assert "data" not in values


def test_the_same_config_may_go_on_wherever_its_data_lie(config, tmp_path):
    run_config.check_same(config, tmp_path)  # nothing there yet
    run_config.save(config, tmp_path)
    config.data.path, config.cache_dir = "elsewhere", "cache"
    run_config.check_same(config, tmp_path)


def test_what_concerns_other_models_may_differ(config, tmp_path):
    run_config.save(config, tmp_path)
    config.parallel.beam_width, config.sasrec.loss = 7, "binary"
    run_config.check_same(config, tmp_path)
    config.model.name = "parallel"
    run_config.save(config, tmp_path)
    config.parallel.beam_width = 8
    with pytest.raises(UserError, match=r"parallel\.beam_width: the run here has 7, not 8"):
        run_config.check_same(config, tmp_path)


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
def test_another_config_is_refused_by_its_key(config, tmp_path, key, value, message):
    run_config.save(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        run_config.check_same(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_key_that_is_newer_than_the_run_has_its_default(config, tmp_path):
    run_config.save(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["training"]["patience"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert run_config.load(tmp_path).training.patience == default_config.get_config().training.patience


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: the file is empty"),
        ('{"seed": 0', "config.json:1: not JSON"),
        ("[]", "config.json: has a JSON list where an object is due"),
        (b'{"seed": "\xff"}', "config.json:1: not UTF-8"),
        ('{"sead": 0}', 'config.json: is not this version\'s config (Key "sead" does not exist'),
        ('{"seed": "x"}', "config.json: is not this version's config (Could not override field 'seed'"),
        ('{"data": 3}', "config.json: is not this version's config ("),
    ],
)
def test_a_damaged_config_is_told(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        run_config.load(tmp_path)
    assert f"{tmp_path}/{message}" in str(caught.value)
    assert "; " in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_config_is_told(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: is not there; give the --workdir of a run"):
        run_config.load(tmp_path)
