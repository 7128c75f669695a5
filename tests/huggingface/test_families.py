"""Every family's checkpoints give the same hidden states and gradients as in torch and Transformers.

`golden/` holds torch's outputs (see make_golden.py). If torch is installed, other checkpoints are compared directly.
"""

import functools
import json

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoConfig

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, load_weights
from simgr_jax.huggingface.checkpoint import Checkpoint, read_config
from simgr_jax.huggingface.load_weights import load_transformer
from simgr_jax.models.transformer import Transformer

GOLDEN, CASES = make_golden.GOLDEN, make_golden.CASES
MAX_LENGTH = make_golden.LENGTHS[0]


def read(folder):
    """A checkpoint's config and tensors."""
    return AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")


def load(folder, max_length=MAX_LENGTH, layers=None):
    """The transformer and the token embeddings [V, D] of a checkpoint, followed by those for each layer.

    Asserts that parameters and sources correspond one to one and have equal shapes.

    Args:
      layers: how many layers to load; None loads all.
    """
    hf_config, tensors = read(folder)
    config = families.transformer_config(hf_config, max_length=max_length)
    config = config.first_layers(layers) if layers else config
    sources, prefix = families.sources(hf_config, tensors, config), families.prefix(hf_config, tensors)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    parameters = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert parameters.keys() == sources.keys()
    for path, leaf in parameters.items():
        value = parameter(sources[path], tensors, prefix, config)
        assert value.shape == leaf.shape
        leaf.set_value(jnp.asarray(value))
    tables = families.EMBEDDING[hf_config.model_type], "embed_tokens_per_layer.weight"
    table = np.concatenate([tensors[prefix + name] for name in tables if prefix + name in tensors], axis=1)
    return nnx.merge(graphdef, state), table


def parameter(source, tensors, prefix, config):
    """One of our parameters, from the checkpoint's tensors."""

    def slot(**indices):
        tensor = tensors[prefix + source.name.format(**indices)]
        if source.part:
            axis, start, stop = source.part
            tensor = np.take(tensor, range(start, stop), axis)
        return np.swapaxes(tensor, -1, -2) if source.transpose else tensor

    def layer(**indices):
        if "{expert}" not in source.name:
            return slot(**indices)
        return np.stack([slot(expert=expert, **indices) for expert in range(config.experts)])

    return np.stack([layer(layer=i) for i in source.layers]) if "{layer}" in source.name else layer()


# Nearly all of the time is compilation.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def hidden_and_gradient(graphdef, state, embeddings, segment_ids, positions, cotangent):
    transformer = nnx.merge(graphdef, state)
    with jax.default_matmul_precision("float32"):  # Accelerators round float32 products otherwise.
        hidden, pull_back = jax.vjp(lambda x: transformer(x, segment_ids, positions), embeddings)
        return hidden, pull_back(cotangent)[0]


def assert_agrees_with_torch(folder, expected, atol=1e-4):
    transformer, table = load(folder)
    graphdef, state = nnx.split(transformer)
    embeddings = table[expected["input_ids"]]
    inputs = embeddings, expected["segment_ids"], expected["positions"], expected["cotangent"]
    hidden, gradient = hidden_and_gradient(graphdef, state, *inputs)
    real = expected["segment_ids"] > 0
    np.testing.assert_allclose(hidden[real], expected["hidden"][real], rtol=0, atol=atol)
    scale = np.abs(expected["gradient"][real]).max()
    np.testing.assert_allclose(gradient[real] / scale, expected["gradient"][real] / scale, rtol=0, atol=atol)


# Others of their families have nearly all of what they have.
LONG = ("mistral3", "olmo2", "lfm2_biases", "gemma4", "qwen3_5")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_padded_and_packed_states_and_gradients_equal_the_golden_ones(name):
    assert_agrees_with_torch(GOLDEN / name, load_file(GOLDEN / name / "expected.safetensors"))


# The others were compared when their golden files were made.
LIVE = ("llama", "gemma2", "qwen3_moe")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in LIVE else pytest.mark.slow) for name in CASES])
def test_padded_and_packed_states_and_gradients_equal_torchs(name, tmp_path):
    pytest.importorskip("torch")
    make_golden.write(name, tmp_path, seed=2)
    # A delta rule's state adds up what each CPU rounds in its own way.
    atol = 2e-4 if name == "qwen3_5_text" else 1e-4
    assert_agrees_with_torch(tmp_path, load_file(tmp_path / "expected.safetensors"), atol)


@pytest.mark.parametrize("name", ["qwen3_moe_fused_window", "gemma3"])
def test_the_loader_reads_unusual_layouts(name):
    checkpoint = Checkpoint(GOLDEN / name)
    config = families.transformer_config(checkpoint.config, max_length=MAX_LENGTH)
    loaded = load_transformer(checkpoint, config, "float32")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(load(GOLDEN / name)[0]))


def by_layer(model):
    """Each layer's parameters."""
    return {
        layer: jax.tree.map(lambda x, row=row: np.asarray(x)[row], nnx.to_pure_dict(nnx.state(stack)))
        for stack, layers in zip(model.layers, model.config.stacks, strict=True)
        for row, layer in enumerate(layers)
    }


@pytest.mark.parametrize(("name", "layers"), [("lfm2", 3), ("gemma4_text", 5), ("gpt2", 1)])
def test_a_decoders_first_layers_can_be_had_alone(name, layers):
    first, whole = (by_layer(load(GOLDEN / name, layers=count)[0]) for count in (layers, None))
    assert first.keys() == set(range(layers))
    jax.tree.map(np.testing.assert_array_equal, first, {layer: whole[layer] for layer in first})


def test_a_line_says_what_beside_the_language_model_is_not_loaded(caplog):
    checkpoint = Checkpoint(GOLDEN / "qwen3_5")
    with caplog.at_level("INFO"):
        load_transformer(checkpoint, families.transformer_config(checkpoint.config, max_length=MAX_LENGTH), "float32")
    said = [record.getMessage() for record in caplog.records if "language model" in record.getMessage()]
    assert said == [f"{GOLDEN / 'qwen3_5'}: only the language model is loaded, not model.visual"]


@pytest.mark.parametrize(
    ("names", "prefix", "parts"),
    [
        (["model.layers.0.x", "lm_head.weight"], "model.", []),
        (["layers.0.x"], "", []),
        (["model.layers.0.x", "mtp.layers.0.x", "mtp.norm.weight"], "model.", ["mtp"]),
        (
            ["model.language_model.norm.weight", "model.vision_tower.a.b", "model.audio_tower.a", "lm_head.weight"],
            "model.language_model.",
            ["model.audio_tower", "model.vision_tower"],
        ),
        (
            ["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.a.b"],
            "language_model.model.",
            ["vision_tower"],
        ),
    ],
)
def test_the_parts_beside_a_language_model_are_found_from_the_tensor_names(names, prefix, parts):
    assert load_weights.other_parts(names, prefix) == parts


@pytest.mark.parametrize("name", CASES)
def test_the_sources_can_be_reversed_to_rebuild_every_tensor_of_the_decoder(name):
    """Follows `Source`'s description of an export."""
    hf_config, tensors = read(GOLDEN / name)
    prefix, state = families.prefix(hf_config, tensors), nnx.state(load(GOLDEN / name)[0])
    parameters = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    pieces = {}
    for path, source in families.sources(hf_config, tensors).items():
        stacked = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in source.name]
        for slot in np.ndindex(parameters[path].shape[: len(stacked)]):
            numbers = dict(zip(stacked, slot, strict=True))
            if "layer" in numbers:
                numbers["layer"] = source.layers[numbers["layer"]]
            tensor = prefix + source.name.format(**numbers)
            piece = parameters[path][slot]
            piece = np.swapaxes(piece, -1, -2) if source.transpose else piece
            pieces.setdefault(tensor, []).append((source.part or (0, 0, 0), piece))
    rebuilt = {}
    for tensor, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        rebuilt[tensor] = np.concatenate([piece for _, piece in parts], axis=parts[0][0][0])
    others = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "wte.weight", "lm_head.weight")
    decoder = {t: x for t, x in tensors.items() if t.startswith(prefix) and not t.endswith(others)}
    assert rebuilt.keys() == decoder.keys()
    jax.tree.map(np.testing.assert_array_equal, rebuilt, decoder)


@pytest.mark.parametrize(
    ("model_type", "names", "prefix"),
    [
        ("llama", ["embed_tokens.weight", "norm.weight"], ""),
        ("llama", ["lm_head.weight", "model.embed_tokens.weight"], "model."),
        (
            "gemma3",
            ["language_model.model.embed_tokens.weight", "vision_tower.embeddings.weight"],
            "language_model.model.",
        ),
        ("gemma3", ["model.language_model.embed_tokens.weight"], "model.language_model."),
        (
            "mistral3",
            ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight", "vision_tower.x.weight"],
            "language_model.model.",
        ),
        ("gpt2", ["wte.weight", "wpe.weight"], ""),
        ("gpt2", ["transformer.wte.weight", "transformer.wpe.weight"], "transformer."),
    ],
)
def test_the_prefix_is_found_from_the_tensor_names(model_type, names, prefix):
    assert families.prefix(AutoConfig.for_model(model_type), names) == prefix


@pytest.mark.parametrize(
    "names", [[], ["model.norm.weight", "not_embed_tokens.weight"], ["a.wte.weight", "b.wte.weight"]]
)
def test_a_checkpoint_without_exactly_one_embedding_table_is_refused(names):
    with pytest.raises(UserError, match=r"^config\.backbone\.checkpoint: has \d tensors named"):
        families.prefix(AutoConfig.for_model("gpt2"), names)


def config_from_json(folder, values):
    """The TransformerConfig of a config.json with `values`, read like a checkpoint's."""
    (folder / "config.json").write_text(json.dumps(values))
    return families.transformer_config(AutoConfig.from_pretrained(folder), max_length=MAX_LENGTH)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"short_factor": [1.0, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


# Transformers' spellings until version 4, still the usual ones on the hub, and today's.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        ),
        (
            {"model_type": "llama", "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        ),
        (
            {"model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": YARN | {"type": "yarn"}},
            {"model_type": "qwen2", "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e6}},
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
        (
            {
                "model_type": "qwen3_5_text",
                "full_attention_interval": 2,
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
            {
                "model_type": "qwen3_5_text",
                "layer_types": ["linear_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            },
        ),
        (
            {"model_type": "lfm2", "full_attn_idxs": [1], "block_ff_dim": 60, "block_multiple_of": 8},
            {
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
                "intermediate_size": 60,
                "block_multiple_of": 8,
            },
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 6, "head_dim": 4},
            {"model_type": "qwen3_moe", "num_local_experts": 6, "head_dim": 4},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_theta": 2e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 2,
            },
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                },
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        (
            {
                "model_type": "olmo3",
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_theta": 2e5,
                "rope_scaling": YARN | {"rope_type": "yarn"},
            },
            {
                "model_type": "olmo3",
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": YARN | {"rope_type": "yarn", "rope_theta": 2e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                },
            },
        ),
        (
            {
                "model_type": "phi3",
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 16,
                "partial_rotary_factor": 0.75,
                "rope_theta": 1e5,
                "rope_scaling": LONGROPE | {"type": "longrope"},
            },
            {
                "model_type": "phi3",
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 16,
                "rope_parameters": LONGROPE
                | {"rope_type": "longrope", "partial_rotary_factor": 0.75, "rope_theta": 1e5},
            },
        ),
    ],
    ids=lambda values: values["model_type"],
)
def test_older_spellings_of_a_config_mean_the_same(tmp_path, old, new):
    config = config_from_json(tmp_path, make_golden.SMALL | old)
    assert config == config_from_json(tmp_path, make_golden.SMALL | new)
    kept = {key: old[key] for key in ("model_type", "num_attention_heads", "head_dim", "layer_types") if key in old}
    assert config != config_from_json(tmp_path, make_golden.SMALL | kept)


def test_multimodal_gemma_3_is_read_like_its_text_part(tmp_path):
    """The hub's configs leave out default values."""
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 7, "sliding_window": 9}
    both = config_from_json(tmp_path, {"model_type": "gemma3", "text_config": text})
    assert both == config_from_json(tmp_path, text)
    assert (both.width, both.heads, both.kv_heads, both.head_width) == (32, 8, 4, 256)
    assert both.windows == (9, 9, 9, 9, 9, 0, 9)


def test_each_expert_has_its_own_tensor_unless_the_checkpoint_fuses_them():
    hf_config, fused = read(GOLDEN / "qwen3_moe_fused_window")
    assert families.sources(hf_config)["layers.0.mlp.down_proj.kernel"] == families.Source(
        "layers.{layer}.mlp.experts.{expert}.down_proj.weight", transpose=True, layers=(0, 1)
    )
    assert families.sources(hf_config, fused)["layers.0.mlp.down_proj.kernel"] == families.Source(
        "layers.{layer}.mlp.experts.down_proj", transpose=True, layers=(0, 1)
    )


@pytest.mark.parametrize(("max_length", "factors"), [(16, (1, 2, 3)), (17, (4, 5, 6))])
def test_longropes_factors_depend_on_the_longest_sequence(max_length, factors):
    rope_parameters = LONGROPE | {"rope_type": "longrope", "rope_theta": 100.0}
    hf_config = AutoConfig.for_model(
        "phi3",
        **{"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": None},
        **{"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": rope_parameters},
    )
    (rope,) = families.transformer_config(hf_config, max_length=max_length).rope
    np.testing.assert_allclose(rope.frequencies, 100 ** -(np.arange(3) / 3) / factors, rtol=1e-6)
    # sqrt(1 + ln 4 / ln 16)
    np.testing.assert_allclose(rope.scale, 1.5**0.5, rtol=1e-6)


LENGTHS = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("parameters", "share"),
    [
        ({"rope_type": "linear", "factor": 8.0}, 1.0),
        (LLAMA3 | {"original_max_position_embeddings": 8192}, 1.0),
        ({"rope_type": "proportional", "factor": 2.0}, 0.25),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 1.0),
        ({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False}, 1.0),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5}, 1.0),
        (
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "beta_fast": 20,
                "beta_slow": 2,
            },
            1.0,
        ),
    ],
)
def test_rotary_frequencies_at_full_size_equal_transformers(parameters, share):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = parameters | {"rope_theta": 5e5, "partial_rotary_factor": share}
    hf_config = AutoConfig.for_model("llama", max_position_embeddings=131072, rope_parameters=parameters)
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config)
    rope = families.transformer_config(hf_config, max_length=MAX_LENGTH).rope[0]
    np.testing.assert_allclose(rope.frequencies, frequencies.numpy(), rtol=4e-7)
    np.testing.assert_allclose(rope.scale, scale, rtol=1e-6)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "options", "named"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, 'rope type "dynamic"'),
        ("llama", {"rope_parameters": HALF}, "partial_rotary_factor"),
        ("mistral", {"hidden_act": "relu"}, 'activation "relu"'),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, 'layer type "chunked_attention"'),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1}, "enable_moe_block"),
        ("gemma4_text", {"num_hidden_layers": 2, "num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
        ("lfm2", {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, 'layer type "linear_attention"'),
        ("qwen3_5_text", {"hidden_act": "gelu"}, 'activation "gelu"'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_unsupported_options_are_refused_by_name(model_type, options, named):
    hf_config = AutoConfig.for_model(model_type, **options)
    for use in (families.sources, functools.partial(families.transformer_config, max_length=8)):
        with pytest.raises(UserError, match=rf"^config\.backbone\.checkpoint: .*{named}.*; use "):
            use(hf_config)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_theta": "abc"}, r"config does not describe a llama model \(ValueError: .*'abc'"),
        ({"rope_theta": 0}, 'the rope type "default" with parameters that give no finite frequencies above 0'),
        ({"rope_theta": -1e4}, "that give no finite frequencies above 0"),
        ({"rope_theta": 10**400}, r"config does not describe a llama model \(OverflowError: "),
        ({"rope_theta": 10**11}, ""),
        ({"rope_parameters": LLAMA3 | {"factor": 8.0}}, ""),
        ({"rope_parameters": LLAMA3 | {"factor": 0}}, 'type "llama3" with parameters that give no finite frequencies'),
        ({"rope_parameters": LLAMA3 | {"factor": -8.0}}, "that give no finite frequencies above 0"),
        ({"rms_norm_eps": 0.0}, r"\(ValueError: norm_epsilon = 0.0\)"),
        ({"rms_norm_eps": -1e-6}, r"\(ValueError: norm_epsilon = -1e-06\)"),
        ({"num_key_value_heads": 3}, r"\(ValueError: heads = 2, kv_heads = 3\)"),
    ],
)
def test_values_that_no_model_has_are_refused_in_one_line(tmp_path, options, message):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 12} | sizes | options))
    describe = lambda: families.transformer_config(read_config(tmp_path), max_length=8)  # noqa: E731
    if not message:
        describe()
        return
    with pytest.raises(UserError, match=message) as caught:
        describe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["bert", None, 3])
def test_unsupported_model_types_are_refused_with_the_list_of_supported_ones(model_type):
    with pytest.raises(UserError) as refusal:
        families.require_supported(model_type, "folder/config.json")
    message = str(refusal.value)
    assert message.startswith(f"folder/config.json:model_type: {model_type!r} is not supported")
    assert "nearest" not in message
    for supported in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "smollm3", "gpt2"):
        assert supported in message
        families.require_supported(supported, "folder/config.json")


@pytest.mark.parametrize(
    ("model_type", "architecture", "near"),
    [
        ("llama4", "Llama4ForConditionalGeneration", {"llama"}),
        ("qwen3_next", "Qwen3NextForCausalLM", {"qwen3", "qwen3_moe", "qwen3_5"}),
        ("granitemoe", None, {"granite"}),
        ("mine", "LlamaForCausalLM", {"llama"}),
        ("mine", "SmolLM3ForCausalLM", {"smollm3"}),
    ],
)
def test_an_unsupported_model_types_nearest_families_are_named(model_type, architecture, near):
    with pytest.raises(UserError) as refusal:
        families.require_supported(model_type, "config.json", [architecture] if architecture else None)
    assert near <= set(str(refusal.value).split("(nearest: ")[1].rstrip(")").split(", "))


def test_a_multimodal_model_with_another_language_model_is_refused(tmp_path):
    text = make_golden.SMALL | {"model_type": "qwen2_moe"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    with pytest.raises(UserError, match=r"config\.json:text_config:model_type: 'qwen2_moe' is .*\(nearest: qwen3_moe"):
        read_config(tmp_path)


def test_a_config_of_an_unsupported_model_type_is_refused():
    with pytest.raises(UserError, match=r"^config\.backbone\.checkpoint: .*'bert' is not supported; use .* llama, "):
        families.transformer_config(AutoConfig.for_model("bert"), max_length=8)


def test_a_sequence_longer_than_the_learned_positions_is_refused():
    hf_config = AutoConfig.for_model("gpt2", n_positions=24)
    assert families.transformer_config(hf_config, max_length=24).max_positions == 24
    with pytest.raises(UserError, match=r"^config\.backbone\.checkpoint: .* 24 learned .* 25; .*row_length"):
        families.transformer_config(hf_config, max_length=25)


def test_the_users_computation_options_are_passed_on():
    config = families.transformer_config(
        AutoConfig.for_model("gpt2", resid_pdrop=0.5), max_length=8, dtype="bfloat16", dropout=0.25, remat="full"
    )
    assert (config.dtype, config.dropout, config.remat) == ("bfloat16", 0.25, "full")
