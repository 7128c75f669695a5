import runpy

import ml_collections
import pytest
from comparisons import config, rates

from simgr_jax import default_config
from simgr_jax.comparison import rows
from simgr_jax.config_keys import flat
from simgr_jax.errors import UserError


def test_a_row_is_the_base_with_what_it_shares_and_its_overrides():
    values = config(
        plain={},
        other={"shares": ("ids", "wide"), "overrides": {"backbone": {"width": 64}, "simgr": {"temperature": 0.1}}},
    )
    values.base.training.epochs = 7
    plain, other = rows.read(values)
    assert plain.config.to_dict() == values.base.to_dict() and plain.overrides == {}
    # What the base has already is no difference: the quantizer's other keys, say.
    assert other.overrides == {
        "semantic_ids.quantizer.name": "residual_kmeans",
        "semantic_ids.quantizer.levels": 3,
        "backbone.width": 64,
        "simgr.temperature": 0.1,
    }
    before, now = flat(values.base), flat(other.config)
    assert {key: now[key] for key in now if now[key] != before[key]} == other.overrides
    assert now["training.epochs"] == 7


def test_rows_come_in_the_configs_order_and_may_be_left_out():
    values = config(b={}, a={}, c={})
    assert [row.name for row in rows.read(values)] == ["b", "a", "c"]
    with values.unlocked():
        values.rows = ("c", "b")
    assert [row.name for row in rows.read(values)] == ["c", "b"]


def test_seeds_are_the_rows_or_the_bases():
    values = config(a={}, b={"seeds": (3, 1)})
    values.base.seed = 5
    assert [row.seeds for row in rows.read(values)] == [(5,), (3, 1)]


def test_trials_are_in_the_order_of_their_numbers_and_can_be_switched_off():
    values = config(a={"trials": {f"trial{n}": {"optimizer": {"learning_rate": n / 1000}} for n in range(1, 12)}})
    (row,) = rows.read(values)
    assert row.trials == tuple({"optimizer.learning_rate": n / 1000} for n in range(1, 12))
    values.trial_epochs = 0
    assert rows.read(values)[0].trials == ()


def test_a_row_can_decode_another_rows_models():
    takes_over = {"overrides": {"model": "rpg", "rpg": {"decoding": "graph"}}, "trained_as": "a"}
    values = config(a={"overrides": {"model": "rpg"}, "seeds": (1, 2), "trials": rates(0.1, 0.2)}, b=takes_over)
    first, second = rows.read(values)
    assert (second.seeds, second.trials, second.trained_as) == (first.seeds, first.trials, "a")


MISTAKES = {
    "no such row": ({"a": {}}, {"rows": ("a", "x")}, 'config.rows: "x" is not in config.models; choose from a'),
    "reference": ({"a": {}}, {"reference": "x"}, 'config.reference: "x" is not in config.rows; choose one of a'),
    "unequal trials": (
        {"a": {"trials": rates(0.1, 0.2)}, "b": {}, "c": {"trials": rates(0.1)}},
        {},
        "config.models.c.trials: there are 1, but a has 2; give all the same number",
    ),
    "shares": (
        {"a": {"shares": ("idz",)}},
        {},
        'config.models.a.shares: "idz" is not in config.shared; choose from ids',
    ),
    "name": ({"a/b": {}}, {}, 'config.models.a/b: "a/b" can\'t name a folder'),
    "seeds": ({"a": {"seeds": (1, 1)}}, {}, "config.models.a.seeds: can't be (1, 1)"),
    "data": (
        {"a": {"overrides": {"data": {"k_core": 5}}}},
        {},
        "config.models.a.overrides.data.k_core: is the same in all rows; change config.base.data.k_core",
    ),
    "cache": (
        {"a": {"overrides": {"cache_dir": "there"}}},
        {},
        "config.models.a.overrides.cache_dir: is the same in all rows; change config.base.cache_dir",
    ),
    "seed": (
        {"a": {"overrides": {"seed": 5}}},
        {},
        "config.models.a.overrides.seed: has no effect; give the row's seeds",
    ),
    "base": ({"a": {}}, {"base.training.epochs": 0}, "config.base.training.epochs: can't be 0; give a number above 0"),
    "epochs of a trial": (
        {"a": {"trials": {"trial1": {"training": {"epochs": 5}}}}},
        {},
        "config.models.a.trials.trial1.training.epochs: is the same in all trials; set config.trial_epochs",
    ),
    "model": (
        {"a": {"overrides": {"model": "magic"}}},
        {},
        'config.models.a.overrides: config.model: "magic" is unknown; choose one of simgr, ',
    ),
    "type": ({"a": {"overrides": {"model": 3}}}, {}, "config.models.a.overrides: Could not override field"),
    "value": (
        {"a": {"overrides": {"training": {"epochs": 0}}}},
        {},
        "config.models.a.overrides: config.training.epochs: can't be 0; give a number above 0",
    ),
    "value of a trial": (
        {"a": {"trials": rates(0.1, -1.0)}},
        {},
        "config.models.a.trials.trial2: config.optimizer.learning_rate: can't be -1.0; give a number above 0",
    ),
    "override that the model does not read": (
        {"a": {"overrides": {"model": "sasrec", "simgr": {"temperature": 0.1}}}},
        {},
        'config.models.a.overrides.simgr.temperature: is not read by model "sasrec"; leave it out: the model reads',
    ),
    "share that the model does not read": (
        {"a": {"shares": ("ids",), "overrides": {"model": "sasrec"}}},
        {},
        'config.shared.ids.semantic_ids.quantizer.levels: is not read by model "sasrec"; leave it out: the model reads',
    ),
    "trial of what the model does not read": (
        {"a": {"overrides": {"model": "item_knn"}, "trials": rates(0.1)}},
        {},
        'config.models.a.trials.trial1.optimizer.learning_rate: is not read by model "item_knn"; leave it out: the mod',
    ),
    "trial epochs": ({"a": {}}, {"trial_epochs": -1}, "config.trial_epochs: can't be -1; give at least 0"),
    "finalists": ({"a": {}}, {"finalists": 0}, "config.finalists: can't be 0; give at least 1"),
    "rounds": ({"a": {}}, {"inference.rounds": 0}, "config.inference.rounds: can't be 0; give at least 1"),
    "trained as what comes later": (
        {"a": {"trained_as": "b"}, "b": {}},
        {},
        'config.models.a.trained_as: "b" is not a trained row above it; name one, or give ""',
    ),
    "trained as, with trials": (
        {"a": {}, "b": {"trained_as": "a", "trials": rates(0.1)}},
        {},
        "config.models.b.trials: are those of a, whose models it takes over; leave them out",
    ),
    "trained as another": (
        {"a": {}, "b": {"trained_as": "a", "overrides": {"backbone": {"layers": 3}}}},
        {},
        "config.models.b: backbone.layers differs from that of a, whose models it takes over; make it the same",
    ),
}


@pytest.mark.parametrize(("models", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(models, changes, message):
    values = config(**models)
    values.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        rows.read(values)
    assert message in str(error.value)


def test_an_override_of_the_base_without_effect_on_any_row_is_refused():
    values = config(a={"overrides": {"model": "sasrec"}}, b={"overrides": {"model": "popularity"}})
    check = rows.COMPARISON_CONFIG.check_overrides
    with pytest.raises(UserError) as caught:
        check(values, ["base.training.epochs", "base.semantic_ids.quantizer.levels"])
    assert str(caught.value) == (
        "config.base.semantic_ids.quantizer.levels: has no effect, as every row ignores or replaces it; leave it out"
    )
    with pytest.raises(UserError, match=r"config\.base\.backbone\.width: has no effect"):
        check(config(a={"shares": ("wide",)}, b={"overrides": {"backbone": {"width": 8}}}), ["base.backbone.width"])
    # One row that reads the key is enough, and other keys of a comparison are no model's.
    check(values, ["base.training.epochs", "base.data.max_items", "base.seed", "trial_epochs", "rows"])
    check(config(a={"overrides": {"model": "popularity"}}, b={}), ["base.semantic_ids.quantizer.levels"])


def test_the_keys_that_a_comparison_may_have():
    values = config(a={"trials": rates(0.1, 0.2)})
    known, required = rows.COMPARISON_CONFIG.keys(values)
    run = default_config.get_config().to_dict()
    assert known.base.to_dict() == required.base.to_dict() == run
    assert (
        known.models.a.overrides.to_dict()
        == known.models.a.trials.trial2.to_dict()
        == known.shared.ids.to_dict()
        == run
    )
    assert required.models.a.overrides.to_dict() == {} and required.shared.to_dict() == {}


@pytest.mark.parametrize("empty", [{}, {"models": 3, "shared": ()}, {"models": {"a": 1}}])
def test_the_keys_of_a_file_that_is_no_comparison(empty):
    _, required = rows.COMPARISON_CONFIG.keys(ml_collections.ConfigDict(empty))
    assert {"base", "models", "shared", "rows"} <= set(required)


def test_the_llms_comparison_differs_in_what_each_row_names(root):
    values = runpy.run_path(str(root / "configs" / "compare_llm.py"))["get_config"]()
    values.shared.llm.backbone.checkpoint, values.shared.random.backbone.checkpoint = "llm", "random"
    values.models.small_with_text.overrides.item_reader.checkpoint = "llm"
    found = {row.name: row.overrides for row in rows.read(values)}
    pretrained = found["pretrained"]
    assert pretrained["backbone.checkpoint"] == "llm" and found["random"]["backbone.checkpoint"] == "random"
    assert found["without_readout"] == pretrained | {"simgr.readout": "state"}
    assert found["without_repeats"] == {key: value for key, value in pretrained.items() if key != "simgr.repeat_bias"}
    texts = {"simgr.item_text", "semantic_ids.embeddings.names", "backbone.token_init"}
    assert found["without_text"] == {key: value for key, value in pretrained.items() if key not in texts}
    assert found["small"] == {"simgr.repeat_bias": True}


def test_the_llms_depths_differ_in_their_checkpoints_alone(root):
    values = runpy.run_path(str(root / "configs" / "compare_llm.py"))["get_config"]("depth")
    values.shared.llm.item_reader.checkpoint, values.shared.random.item_reader.checkpoint = "llm", "random"
    found = {row.name: row.overrides for row in rows.read(values)}
    deepest = found["pretrained_30"]
    assert deepest["item_reader.checkpoint"] == "llm"
    assert found["pretrained_6"] == deepest | {"backbone.checkpoint": "workdirs/llm_6_layers"}
    assert found["random_6"]["item_reader.checkpoint"] == "random" and "lora.rank" not in found["random_6"]


def test_the_llms_prompts_differ_in_what_is_read_of_an_item(root):
    values = runpy.run_path(str(root / "configs" / "compare_llm.py"))["get_config"]("prompts")
    values.shared.llm.backbone.checkpoint = "llm"
    found = {row.name: row.overrides for row in rows.read(values)}
    item, title = found["item"], found["title_12"]
    assert set(title) - set(item) == {
        *("simgr.history", "prompt.item", "prompt.max_title_tokens"),
        *("training.row_length", "training.batch_rows"),
    }
    assert set(found["title_12_after_words"]) - set(title) == {"prompt.prefix"}
    assert found["title_6"] == title | {"prompt.max_title_tokens": 6}
    assert found["title_12_of_8_items"] == title | {"data.max_items": 8}
    assert "prompt.max_title_tokens" not in found["codes"]
