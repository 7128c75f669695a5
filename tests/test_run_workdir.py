"""What a run reads from its workdir: its config, with which changes it may continue, and its semantic IDs."""

import json

import numpy as np
import pytest

from simgr_jax import default_config, saved_config
from simgr_jax.config_files import load_run_config
from simgr_jax.config_keys import flat, with_values
from simgr_jax.devices.choose_dtype import choose_dtype
from simgr_jax.errors import UserError
from simgr_jax.run import Run
from simgr_jax.semantic_ids import saved_ids
from simgr_jax.workdir import config_file, trained_on
from simgr_jax.workdir.cache import fingerprint


@pytest.fixture
def config():
    config = default_config.get_config()
    config.data.path = "data"
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.optimizer.learning_rate = 1.0
    return config


def save(config, workdir):
    config_file.save(config.to_dict(), workdir)


def test_a_run_loads_the_config_with_its_types_and_locks_it(config, tmp_path):
    save(config, tmp_path)
    loaded = Run.load(tmp_path).config
    assert flat(loaded) == flat(config)
    types = {key: type(value) for key, value in flat(loaded).items()}
    assert types == {key: type(value) for key, value in flat(config).items()}
    assert loaded.semantic_ids.embeddings.names == ("tfidf", "interactions")
    with pytest.raises(AttributeError):
        loaded.new_key = 1


def test_flat_names_every_value_by_its_full_key(config):
    values = flat(config)
    assert values["seed"] == 0
    assert values["data.path"] == "data"
    assert values["semantic_ids.quantizer.rqvae.hidden_widths"] == (512, 256)
    assert "data" not in values


def test_a_run_continues_wherever_its_data_are(config, tmp_path):
    saved_config.check_same(config, tmp_path)  # There is no run yet.
    save(config, tmp_path)
    config.data.path, config.cache_dir = "elsewhere", "cache"
    saved_config.check_same(config, tmp_path)


def test_keys_that_the_run_does_not_read_may_differ(config, tmp_path):
    save(config, tmp_path)
    config.rpg.beam_width, config.sasrec.loss = 7, "binary"
    config.simgr.log_q, config.data.test_fraction = False, 0.2
    saved_config.check_same(config, tmp_path)
    config.model, config.rpg.decoding = "rpg", "graph"
    save(config, tmp_path)
    config.rpg.beam_width = 8
    with pytest.raises(UserError, match=r"rpg\.beam_width: the run here has 7, not 8"):
        saved_config.check_same(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 7, r"config\.json:seed: the run here has 0, not 7; continue with the same config, or choose another"),
        ("data.name", "x", r"config\.json:data\.name: the run here has '', not 'x'; "),
        (
            "semantic_ids.embeddings.names",
            ("npy",),
            r"embeddings\.names: the run here has \('tfidf', 'interactions'\), not",
        ),
    ],
)
def test_another_config_is_refused_and_its_key_named(config, tmp_path, key, value, message):
    save(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        saved_config.check_same(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_may_be_trained_longer_but_not_shorter(config, tmp_path):
    save(config, tmp_path)
    epochs = config.training.epochs
    config.training.epochs, config.optimizer.restart_epoch = epochs + 5, epochs
    saved_config.check_same(config, tmp_path, may_be_longer=True)
    with pytest.raises(UserError, match=r"restart_epoch: the run here has 0, not 30"):
        saved_config.check_same(config, tmp_path)  # As a comparison does.
    config.training.epochs = epochs
    with pytest.raises(UserError, match=r"optimizer\.restart_epoch: the run here has 0, not 30"):
        saved_config.check_same(config, tmp_path, may_be_longer=True)
    config.optimizer.restart_epoch, config.training.epochs = 0, epochs - 1
    with pytest.raises(UserError, match=rf"training\.epochs: the run here has {epochs}, not {epochs - 1}"):
        saved_config.check_same(config, tmp_path, may_be_longer=True)
    config.training.epochs, config.training.patience = epochs, config.training.patience + 1
    saved_config.check_same(config, tmp_path, may_be_longer=True)


def test_a_restart_that_leaves_no_epoch_is_refused(config, tmp_path):
    config.optimizer.restart_epoch = config.training.epochs
    with pytest.raises(UserError, match=r"^config\.optimizer\.restart_epoch: 30 leaves no epoch of "):
        Run(config, tmp_path)


@pytest.mark.parametrize(
    ("epochs", "validations", "warnings"),
    [(3, (1, 1, 1), [2]), (3, (1, 0, 1), []), (4, (1, 0, 1, 1), [4]), (5, (1, 1, 0, 1, 1), [2]), (1, (1,), [1])],
)
def test_a_run_that_recommends_the_same_to_all_warns_once(config, tmp_path, caplog, epochs, validations, warnings):
    """At the second validation in a row, because after the first a run that learns may do the same. A run of one epoch
    has no other."""
    config.training.epochs = epochs
    run, warned = Run(config, tmp_path), []
    for number, is_equal in enumerate(validations, start=1):
        caplog.clear()
        run._warn_of_equal_lists(bool(is_equal), 0.0123)
        warned += [number] * ("coverage@10 is 0.012: nearly all users get the same items" in caplog.text)
    assert warned == warnings


LEFT_OPEN = {"backbone.dtype": "auto", "training.batch_rows": 0}


def test_what_a_run_has_chosen_holds_for_whoever_lets_it_choose(config, tmp_path):
    chosen = {"backbone.dtype": "bfloat16", "training.batch_rows": 12}
    save(with_values(config, chosen), tmp_path)
    left_open = with_values(config, LEFT_OPEN).lock()
    settled = flat(Run(left_open, tmp_path).config)
    assert {key: settled[key] for key in chosen} == chosen
    assert settled | LEFT_OPEN == flat(left_open)
    saved_config.check_same(left_open, tmp_path)
    with pytest.raises(UserError, match=r"training\.batch_rows: the run here has 12, not 8"):
        saved_config.check_same(with_values(config, chosen | {"training.batch_rows": 8}), tmp_path)


def test_a_run_that_has_chosen_nothing_yet_may_choose(config, tmp_path):
    """As the workdir that a comparison prepares."""
    left_open = with_values(config, LEFT_OPEN).lock()
    save(left_open, tmp_path)
    run = Run(left_open, tmp_path)
    assert run.config.backbone.dtype == choose_dtype("cpu")
    assert run.config.training.batch_rows == 0
    saved_config.check_same(run.config, tmp_path)
    assert Run(left_open, tmp_path, platform="tpu").config.backbone.dtype == "bfloat16"


def test_a_key_that_an_older_run_lacks_has_its_default(config, tmp_path):
    save(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["training"]["patience"], values["hstu"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded, default = Run.load(tmp_path).config, default_config.get_config()
    assert loaded.training.patience == default.training.patience
    assert loaded.hstu.to_dict() == default.hstu.to_dict()
    saved_config.check_same(config, tmp_path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sead": 0}, 'Key "sead" does not exist'),
        ({"seed": "x"}, "Could not override field 'seed'"),
        ({"data": 3}, ""),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, values, reason):
    config_file.save(values, tmp_path)
    with pytest.raises(UserError) as caught:
        Run.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.json: is not this version's config ({reason}")
    assert message.endswith("; train in a new workdir") and len(message) < 400


@pytest.fixture
def learned(tmp_path):
    """A run without a model, on tiny embedded data, whose workdir has its semantic IDs and a checkpoint."""
    tiny = {"data.synthetic.num_users": 60, "data.synthetic.num_items": 30, "semantic_ids.embeddings.dim": 8}
    tiny |= {"semantic_ids.quantizer.levels": 2, "semantic_ids.quantizer.codebook_size": 4}
    run = Run(load_run_config("quickstart", tiny), tmp_path)
    saved_ids.write(tmp_path / "semantic_ids.npz", run.semantic_ids, run.id_quality)
    trained_on.save({"items": fingerprint(run.dataset.item_ids)}, tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return run


def test_a_run_keeps_its_semantic_ids_from_the_first_checkpoint_on(learned):
    """Another seed would give other IDs."""
    config = with_values(learned.config, {"seed": 1})
    kept, others = Run(config, learned.workdir), Run(config, learned.workdir.parent / "new")
    np.testing.assert_array_equal(kept.semantic_ids.codes, learned.semantic_ids.codes)
    assert kept.semantic_ids.codebook_sizes == learned.semantic_ids.codebook_sizes
    assert kept.semantic_ids.codes.dtype == np.int32 and kept.id_quality == learned.id_quality
    assert not np.array_equal(others.semantic_ids.codes, learned.semantic_ids.codes)
    (learned.workdir / "checkpoints" / "10").rmdir()
    before_it_learns = Run(config, learned.workdir)
    np.testing.assert_array_equal(before_it_learns.semantic_ids.codes, others.semantic_ids.codes)


def test_semantic_ids_of_other_items_are_refused(learned):
    (learned.workdir / "trained_on.json").write_text('{"items": "others"}')
    with pytest.raises(UserError, match=r"trained_on.json:items: have changed since the run here was trained"):
        _ = Run(learned.config, learned.workdir).semantic_ids


def test_a_model_that_knows_items_by_their_index_has_no_semantic_ids(learned):
    run = Run(with_values(learned.config, {"model": "sasrec"}), learned.workdir.parent / "new")
    assert run.semantic_ids is None and run.id_quality == {}
    assert run._learned_contents() == {}
