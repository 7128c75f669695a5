"""Transformers can read the saved folders, and computes the same hidden states from them."""

import json
import re
import shutil
import weakref

import jax
import jax.numpy as jnp
import make_golden
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_families import load
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, save_weights
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.load_weights import load_transformer, read_input_rows
from simgr_jax.models import lora
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config

GOLDEN, LENGTH, WORDS = make_golden.GOLDEN, make_golden.LENGTHS[0], make_golden.VOCABULARY
NEW = ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]
# Covers every family, every layout, and the one config that saving changes.
NAMES = (
    "llama_biases_linear_rope",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_fused_window",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3_partial_rotary",
    "phi3_longrope_long",
    "smollm3",
    "gpt2",
    "olmo2",
    "olmo3",
    "granite",
    "ministral3",
    "mistral3",
    "lfm2_biases",
    "gemma4_text",
    "gemma4",
    "qwen3_5_text",
    "qwen3_5",
)
MULTIMODAL = ("gemma3", "gemma4", "mistral3", "qwen3_5")
# What these have the others have, too, or test_families.py covers it.
LONG = ("olmo3", "granite", "ministral3", "mistral3")
LONG += ("lfm2_biases", "gemma4_text", "gemma4", "qwen3_5_text", "qwen3_5")


def tokenizer(size=WORDS, new_tokens=NEW):
    """Words w0, w1, ... and `new_tokens`; w0 begins every text."""
    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    result = PreTrainedTokenizerFast(tokenizer_object=inner)
    result.add_tokens(list(new_tokens))
    return result


def trained(checkpoint):
    """The checkpoint's decoder with changed weights and adapters."""
    backbone, _ = load(checkpoint.path)
    targets = ("q_proj", "v_proj", "o_proj", "router" if backbone.config.experts else "down_proj")
    lora.add(backbone, lora.LoRAConfig(2, 3.0, targets, 0.0), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    changed = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), nnx.state(backbone))
    nnx.update(backbone, changed)
    return backbone


def rows(count, width=16, seed=1):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def hidden(backbone, embeddings):
    shape = embeddings.shape[:2]
    segments, positions = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1]), shape)
    run = nnx.jit(lambda backbone, x: backbone(x, segments, positions))
    return np.asarray(run(backbone, jnp.asarray(embeddings)))


def written(folder, checkpoint, backbone=None, new=NEW, words=WORDS, embedding=None, dtype=None, **text):
    """Saves to `folder`; returns the tensors written there."""
    folder.mkdir(exist_ok=True)
    embedding = rows(len(new)) if embedding is None else embedding
    backbone = backbone or load(checkpoint.path)[0]
    tokens = save_weights.TrainedTokens(new, embedding, **text)
    save_weights.save_finetuned(folder, checkpoint, backbone, tokenizer(words, new), tokens, dtype)
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def copy(name, folder, **config):
    """A golden checkpoint with a changed config."""
    shutil.copytree(GOLDEN / name, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return Checkpoint(folder)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES])
def test_transformers_computes_the_same_hidden_states(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    checkpoint = Checkpoint(GOLDEN / name)
    backbone, new = trained(checkpoint), rows(len(NEW))
    written(tmp_path / "out", checkpoint, backbone, embedding=new)

    model, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    ids = np.random.default_rng(2).integers(0, WORDS + len(NEW), (2, LENGTH))
    ids[1, 9:] = 0
    table = read_input_rows(checkpoint, range(WORDS))
    table = np.concatenate([table, np.pad(new, ((0, 0), (0, table.shape[1] - new.shape[1])))])
    with torch.no_grad():
        theirs, short = (model.eval()(torch.tensor(x)).last_hidden_state.numpy() for x in (ids, ids[1:, :9]))
    ours = hidden(backbone, table[ids])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    np.testing.assert_allclose(short, ours[1:, :9], rtol=0, atol=1e-4)


def one_tensor_per_expert(tensors):
    result = {}
    for key, array in tensors.items():
        folder, _, kind = key.rpartition(".experts.")
        parts = {kind: array}
        if kind == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(array, 2, axis=1), strict=True))
        for name, experts in parts.items():
            result |= (
                {f"{folder}.experts.{i}.{name}.weight": x for i, x in enumerate(experts)} if folder else {key: array}
            )
    return result


# Quick ones are multimodal, or of these families, too.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("gemma4", "qwen3_5") else ()) for name in NAMES]
)
def test_unchanged_tensors_are_written_unchanged(name, tmp_path):
    before = load_file(GOLDEN / name / "model.safetensors")
    after = written(tmp_path / "out", Checkpoint(GOLDEN / name), new=(), embedding=rows(0))
    if name in MULTIMODAL:  # Only the language model is written.
        before = {
            key.replace("language_model.", ""): x
            for key, x in before.items()
            if re.search("language_model|lm_head", key)
        }
        before = {re.sub("^model.model.", "model.", key): x for key, x in before.items()}
    if name == "qwen3_moe_fused_window":
        before = one_tensor_per_expert(before)
    assert after.keys() == before.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2"])
def test_the_language_model_head_has_rows_for_the_new_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    new = rows(len(NEW))
    written(tmp_path / "out", Checkpoint(GOLDEN / name), embedding=new)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    np.testing.assert_array_equal(model.get_output_embeddings().weight.detach()[WORDS:], new)


def test_an_untied_head_keeps_its_other_rows(tmp_path):
    before = load_file(GOLDEN / "mistral" / "model.safetensors")["lm_head.weight"]
    after = written(tmp_path / "out", Checkpoint(GOLDEN / "mistral"))["lm_head.weight"]
    np.testing.assert_array_equal(after, np.concatenate([before, rows(len(NEW))]))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mistral", {"tie_word_embeddings": True}),  # Its head is not used.
        ("llama_biases_linear_rope", {}),  # Untied, and without a head.
        ("qwen2", {}),
        ("gemma3", {}),
    ],
)
def test_a_head_that_is_tied_or_missing_follows_the_embeddings(name, config, tmp_path):
    tensors = written(tmp_path / "out", copy(name, tmp_path / "in", **config))
    assert not any("lm_head" in key for key in tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_of_another_shape_than_the_embeddings_is_refused(tmp_path):
    checkpoint = copy("mistral", tmp_path / "in")
    tensors = load_file(GOLDEN / "mistral" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    save_weights.save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight: has shape \[48, 16\], but .*config.json implies \[49, 16\]"):
        written(tmp_path / "out", Checkpoint(checkpoint.path))


@pytest.mark.parametrize(("words", "length"), [(WORDS, WORDS + 5), (WORDS - 2, WORDS + 3), (WORDS - 9, WORDS)])
def test_the_table_grows_to_the_tokenizers_size_and_never_shrinks(tmp_path, words, length):
    before = load_file(GOLDEN / "qwen3" / "model.safetensors")["model.embed_tokens.weight"]
    table = written(tmp_path / "out", Checkpoint(GOLDEN / "qwen3"), words=words)["model.embed_tokens.weight"]
    assert len(table) == length == json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(NEW)
    np.testing.assert_array_equal(table[ids], rows(len(NEW)))
    others = np.setdiff1d(np.arange(WORDS), ids)
    np.testing.assert_array_equal(table[others], before[others])


def test_trained_text_embeddings_replace_the_checkpoints(tmp_path):
    trained = {"text_tokens": [5, 2], "text_embedding": jnp.asarray(rows(2, seed=7))}
    tables = [
        written(tmp_path / name, Checkpoint(GOLDEN / "qwen3"), **more) for name, more in (("a", {}), ("b", trained))
    ]
    expected, table = (tensors["model.embed_tokens.weight"] for tensors in tables)
    expected[[5, 2]] = trained["text_embedding"]
    np.testing.assert_array_equal(table, expected)


def test_trained_embeddings_for_each_layer_replace_the_checkpoints_and_new_tokens_have_zeros(tmp_path):
    checkpoint = Checkpoint(GOLDEN / "gemma4_text")
    width = read_input_rows(checkpoint, [0]).shape[1]
    trained = {"text_tokens": [5, 2], "text_embedding": jnp.asarray(rows(2, width, seed=7))}
    after = written(tmp_path / "out", checkpoint, **trained)["model.embed_tokens_per_layer.weight"]
    expected = np.pad(checkpoint.read("model.embed_tokens_per_layer.weight"), ((0, len(NEW)), (0, 0)))
    expected[[5, 2]] = trained["text_embedding"][:, 16:]
    np.testing.assert_array_equal(after, expected)


def test_the_tokenizer_reads_new_tokens_and_old_text(tmp_path):
    written(tmp_path / "out", Checkpoint(GOLDEN / "qwen3"))
    text = "w3 w4<a_0><b_2>w5 w1"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == [0, 3, 4, WORDS, WORDS + 4, 5, 1]


def test_the_config_is_the_checkpoints_except_for_the_vocabulary_size(tmp_path):
    checkpoint = copy("qwen3", tmp_path / "in", made_by="somebody", torch_dtype="float32")
    written(tmp_path / "out", checkpoint)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert after == before | {"vocab_size": WORDS + len(NEW), "rope_theta": 10000.0}  # 4.57 reads the latter.


@pytest.mark.parametrize(
    ("name", "model_type", "architecture"),
    [
        ("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
        ("gemma4", "gemma4_text", "Gemma4ForCausalLM"),
        ("mistral3", "ministral3", "Ministral3ForCausalLM"),
        ("qwen3_5", "qwen3_5_text", "Qwen3_5ForCausalLM"),
    ],
)
def test_only_the_language_model_of_a_multimodal_model_is_written(tmp_path, name, model_type, architecture):
    tensors = written(tmp_path / "out", Checkpoint(GOLDEN / name))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.architectures) == (model_type, [architecture])
    assert all(name.startswith(("model.", "lm_head.")) and "vision" not in name for name in tensors)


@pytest.mark.parametrize("in_file", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_the_dtype_is_the_checkpoints_or_the_requested_one(tmp_path, in_file, asked):
    copy("mistral", tmp_path / "in", dtype=np.dtype(in_file).name)
    before = load_file(GOLDEN / "mistral" / "model.safetensors")
    tensors = {name: array.astype(in_file) for name, array in before.items()}
    save_weights.save_file(tensors, tmp_path / "in" / "model.safetensors")
    after = written(tmp_path / "out", Checkpoint(tmp_path / "in"), dtype=asked)
    expected = np.dtype(asked or in_file)
    assert {array.dtype for array in after.values()} == {expected}
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith(expected.name)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(after[name], tensors[name].astype(expected))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2"])
def test_several_files_with_an_index_hold_the_same_as_one_file(tmp_path, monkeypatch, name):
    checkpoint = Checkpoint(GOLDEN / name)
    whole = written(tmp_path / "whole", checkpoint)
    monkeypatch.setattr(save_weights, "_SHARD_BYTES", 3000)
    parts = written(tmp_path / "parts", checkpoint)
    assert parts.keys() == whole.keys()
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        tensors = load_file(tmp_path / "parts" / file)
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= 3000
        assert tensors.keys() == {key for key, other in index["weight_map"].items() if other == file}
        assert all(np.array_equal(array, whole[key]) for key, array in tensors.items())


def test_at_most_one_file_of_weights_is_held(tmp_path, monkeypatch):
    """The host frees each tensor once its file is written."""
    alive, most = [], []

    def count(folder, tensors):
        def watched():
            for name, array in tensors:
                most.append(sum(reference() is not None for reference in alive))
                alive.append(weakref.ref(array))
                yield name, array
                del array

        write(folder, watched())

    write = save_weights._write_weights
    monkeypatch.setattr(save_weights, "_write_weights", count)
    monkeypatch.setattr(save_weights, "_SHARD_BYTES", 1)
    written(tmp_path / "out", Checkpoint(GOLDEN / "qwen3"))
    assert max(most) <= 1


def test_a_saved_model_loads_like_any_checkpoint(tmp_path):
    checkpoint = Checkpoint(GOLDEN / "phi3")
    backbone = trained(checkpoint)
    written(tmp_path / "out", checkpoint, backbone)
    again = Checkpoint(tmp_path / "out")
    again = load_transformer(again, families.transformer_config(again.config, max_length=LENGTH), "float32")
    embeddings = rows(LENGTH)[None]
    np.testing.assert_allclose(hidden(again, embeddings), hidden(backbone, embeddings), rtol=0, atol=1e-5)


def write_from_scratch(folder):
    """Saves a decoder as a run that trained it from scratch does; returns the decoder."""
    config = from_scratch_config(
        width=16, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=20, rope_theta=50.0, norm_epsilon=1e-3
    )
    backbone = Transformer(config, nnx.Rngs(0))
    nnx.update(backbone, jax.tree.map(lambda x: 10 * x, nnx.state(backbone)))
    save_weights.save_from_scratch(folder, backbone, 50.0, LENGTH, save_weights.TrainedTokens(NEW, rows(len(NEW))))
    return backbone


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory):
    """A folder with a decoder trained from scratch, and that decoder."""
    folder = tmp_path_factory.mktemp("scratch")
    return folder, write_from_scratch(folder)


def test_a_decoder_from_scratch_is_a_llama_over_its_codes(from_scratch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, backbone = from_scratch
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ids = np.random.default_rng(2).integers(0, len(NEW), (2, LENGTH))
    with torch.no_grad():
        theirs = model.eval().model(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(theirs, hidden(backbone, rows(len(NEW))[ids]), rtol=0, atol=1e-4)


def test_the_tokenizer_of_a_decoder_from_scratch_reads_only_codes(from_scratch):
    loaded = AutoTokenizer.from_pretrained(from_scratch[0])
    assert loaded("<a_1><b_2> <a_0>, and\nso on").input_ids == [1, 4, 0]
    assert loaded.convert_ids_to_tokens(range(len(loaded))) == NEW
