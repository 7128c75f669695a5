"""An exported config.json says the same in the spelling of Transformers 4.57 as in that of 5.

tests/huggingface/test_transformers_versions.py lets 4.57 itself read exports.
"""

import json

import numpy as np
import pytest
import transformers
from transformers import AutoConfig

from simgr_jax.huggingface import families
from simgr_jax.huggingface.export_config import Loading, in_both_spellings, loading

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.2, 4.0, 5.0, 7.0]}
LONGROPE = LONG | {"rope_type": "longrope", "rope_theta": 9.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 20,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 9.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": LONGROPE,
    "longrope with a scale": LONGROPE | {"attention_factor": 1.5},
    "longrope with a factor": LONGROPE | {"factor": 9.0},
    "proportional": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
}
LOCAL = {"rope_type": "default", "rope_theta": 70.0}


def make(family, rope=None, **options):
    """A config as Transformers 5 reads and writes it."""
    if family == "Gemma3Text":
        rope = {"full_attention": rope or ROPES["default"], "sliding_attention": options.pop("local", LOCAL)}
        options["layer_types"] = ["sliding_attention", "full_attention"]
    options |= {"rope_parameters": rope} if rope else {}
    if family not in ("GPT2", "Phi3"):
        options["head_dim"] = 8
    return getattr(transformers, f"{family}Config")(**SMALL | options)


def written(config, **options):
    return in_both_spellings(json.loads(config.to_json_string()), config, **options)


def read(values, max_length=1):
    """The decoder that Transformers 5 reads of a config.json."""
    values = json.loads(json.dumps(values))  # Reading changes nested values.
    return families.transformer_config(AutoConfig.for_model(**values), max_length=max_length)


def assert_same_positions(one, other):
    for a, b in zip(one.rope, other.rope, strict=True):
        np.testing.assert_allclose(a.frequencies, b.frequencies, rtol=1e-6, atol=1e-20)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3Text", "SmolLM3", "Lfm2"]
)
def test_both_spellings_give_the_positions_of_training(family, rope):
    config = make(family, ROPES[rope])
    values = written(config)
    older = {key: value for key, value in values.items() if key != "rope_parameters"}
    newer = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    for max_length in (1, 64):
        expected = families.transformer_config(config, max_length=max_length)
        for spelling in (values, older, newer):
            assert_same_positions(read(spelling, max_length), expected)
    assert "rope_theta" not in values.get("rope_scaling", {})  # 4.57 warns of it.


@pytest.mark.parametrize("rope", ["default", "longrope", "longrope with a scale", "longrope with a factor"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_both_spellings_give_the_positions_of_phi_3(rope, share):
    factors = {key: ROPES[rope][key][: int(4 * share)] for key in LONG if key in ROPES[rope]}
    parameters = ROPES[rope] | factors | {"partial_rotary_factor": share}
    config = make("Phi3", parameters, original_max_position_embeddings=16)
    values = written(config)
    older = {key: value for key, value in values.items() if key != "rope_parameters"}
    for max_length in (1, 64):
        expected = families.transformer_config(config, max_length=max_length)
        for spelling in (values, older):
            assert_same_positions(read(spelling, max_length), expected)
    # 4.57 accepts no other keys, and has no other place for a scale of its own.
    accepted = {"type", "short_factor", "long_factor"}
    own_scale = {"attention_factor"} if " with " in rope else set()
    assert rope == "default" or values["rope_scaling"].keys() == accepted | own_scale


def test_the_long_form_replaces_the_short_one_where_training_used_it():
    values = written(make("Phi3", LONGROPE, original_max_position_embeddings=16), uses_long_form=True)
    for spelling in (values["rope_parameters"], values["rope_scaling"]):
        assert spelling["short_factor"] == spelling["long_factor"] == LONG["long_factor"]


# What 4.57 has to find.
KEYS = {
    "Llama": (make("Llama", ROPES["default"]), {"rope_theta": 50.0}),
    "Phi 3": (make("Phi3", ROPES["default"] | {"partial_rotary_factor": 0.5}), {"partial_rotary_factor": 0.5}),
    "Gemma 3": (make("Gemma3Text"), {"rope_theta": 50.0, "rope_local_base_freq": 70.0}),
    # It would scale neither; null is an error.
    "Gemma 3, scaled": (
        make("Gemma3Text", local=LOCAL | {"rope_type": "linear", "factor": 2.0}),
        {"rope_local_base_freq": None},
    ),
    "Qwen 3 with experts": (make("Qwen3Moe", num_experts=5), {"num_experts": 5, "num_local_experts": 5}),
}


@pytest.mark.parametrize(("config", "expected"), KEYS.values(), ids=KEYS)
def test_the_older_keys(config, expected):
    values = written(config)
    assert {key: values[key] for key in expected} == expected
    assert "rope_scaling" not in values


@pytest.mark.parametrize("family", ["GPT2", "Gemma4Text", "Ministral3", "Qwen3_5Text"])
def test_a_config_stays_without_rotary_positions_or_if_4_57_does_not_know_the_model(family):
    config = make(family)
    assert written(config) == json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make("Llama"), Loading()),
        (make("GPT2"), Loading()),
        (make("Gemma2", attn_logit_softcapping=None), Loading()),
        # Other attention than "eager" leaves these out in 4.57.
        (make("Gemma2"), Loading(options=', attn_implementation="eager"')),
        (make("GPT2", scale_attn_weights=False), Loading(options=', attn_implementation="eager"')),
        (make("Gemma3Text"), Loading("AutoModelForCausalLM", attribute=".model")),
        (make("Ministral3"), Loading(since="5.0")),
    ],
)
def test_how_both_versions_load_a_model(config, expected):
    assert loading(config) == expected


def test_the_code_that_loads_a_model():
    assert Loading().code("here", ", dtype=x") == "AutoModel.from_pretrained(here, dtype=x)"
    assert Loading("A", ', b="c"', ".d").code("here") == 'A.from_pretrained(here, b="c").d'
