"""A checkpoint's config, cut to its first layers."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, Gemma4TextConfig

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint, read_config
from simgr_jax.huggingface.first_layers import cut
from tests.huggingface.make_golden import GOLDEN
from tests.huggingface.test_families import CASES

# The first layers of `lfm2_biases` have no attention.
CUT = sorted(name for name in CASES if "gemma4" not in name and name != "lfm2_biases")


@pytest.mark.parametrize("name", CUT)
def test_the_config_is_that_of_the_decoders_first_layers(name, tmp_path):
    whole = families.transformer_config(Checkpoint(GOLDEN / name).config, max_length=20)
    layers = whole.layers - 1
    checkpoint = Checkpoint(GOLDEN / name, layers)
    expected = whole.first_layers(layers)
    assert families.transformer_config(checkpoint.config, max_length=20) == expected
    assert families.transformer_config(read_config(GOLDEN / name, layers), max_length=20) == expected
    # Also if Transformers reads what an export would have.
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_values))
    assert families.transformer_config(AutoConfig.from_pretrained(tmp_path), max_length=20) == expected


def test_gemma_4_ends_with_full_attention_which_transformers_would_give_it_anyway():
    """Transformers would compute something else with an export that ends otherwise."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "layer_types": kinds, "hidden_size_per_layer_input": 0}
    config = Gemma4TextConfig(**sizes, attention_k_eq_v=True, num_global_key_value_heads=2)
    values = json.loads(config.to_json_string())
    whole = families.transformer_config(config, max_length=20)
    expected = dataclasses.replace(whole.first_layers(2), per_layer_count=2)
    for found in (cut(config, values, 2)[0], Gemma4TextConfig(**cut(config, values, 2)[1])):
        assert families.transformer_config(found, max_length=20) == expected
    with pytest.raises(UserError, match=r"can't be 3; .* give one of 2, 4, or 0 for all"):
        cut(config, values, 3)


def test_a_cut_that_is_none_leaves_the_config():
    assert Checkpoint(GOLDEN / "llama", 2).config_values == Checkpoint(GOLDEN / "llama").config_values


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("llama", 3, "can't be 3; the LLM has 2 layers, give up to as many, or 0 for all"),
        ("llama", -1, "can't be -1"),
        ("qwen3_5_text", 1, "can't be 1; the LLM's first attention is in layer 2"),
        ("lfm2", 1, "can't be 1; the LLM's first attention is in layer 2"),
        ("gemma4_text", 2, "a gemma4_text model can't be cut"),
    ],
)
def test_other_cuts_are_refused(name, layers, message):
    with pytest.raises(UserError, match=rf"config\.backbone\.first_layers: {message}"):
        Checkpoint(GOLDEN / name, layers)
