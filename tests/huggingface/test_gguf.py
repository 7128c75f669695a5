"""A GGUF file is read as the Hugging Face checkpoint that it was made of, and its tokenizer as llama.cpp's.

`golden/gguf/` holds files of llama.cpp's converter and llama.cpp's tokens (see make_gguf.py). What is read of a tensor
is compared with the `gguf` package's own reader.
"""

import dataclasses
import json
import os
import shutil
import struct

import gguf
import make_gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, gguf_file, gguf_tokenizer
from simgr_jax.huggingface.checkpoint import Checkpoint, read_config
from simgr_jax.huggingface.gguf_architectures import GgufTensor
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer
from simgr_jax.huggingface.load_weights import load_transformer
from simgr_jax.huggingface.pretrained import checkpoint_path

GOLDEN = make_gguf.FOLDER
BYTE_LEVEL, SENTENCEPIECE = GOLDEN / "byte_level.gguf", GOLDEN / "sentencepiece.gguf"
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())
QUANTIZED = [kind for kind in gguf_file.TENSOR_TYPES if kind not in ("F32", "F16", "BF16")]


def transformer_config(path, max_length):
    """The decoder's config as a dict, with floats of five digits: a GGUF file has float32."""
    config = families.transformer_config(read_config(path), max_length=max_length)
    return json.loads(json.dumps(dataclasses.asdict(config)), parse_float=lambda text: f"{float(text):.5g}")


@pytest.mark.parametrize("name", make_gguf.CASES)
def test_a_converted_model_has_the_original_ones_config(name):
    converted, original = read_config(GOLDEN / name / "model.gguf"), read_config(GOLDEN / name)
    assert type(converted) is type(original)
    assert (converted.vocab_size, converted.tie_word_embeddings) == (original.vocab_size, original.tie_word_embeddings)
    # Phi-3's frequencies depend on the length.
    for length in (8, 24):
        ours, theirs = (transformer_config(GOLDEN / name / file, length) for file in ("model.gguf", ""))
        assert ours == theirs


@pytest.mark.parametrize("name", make_gguf.CASES)
def test_a_converted_model_has_the_original_ones_tensors(name):
    converted, original = Checkpoint(GOLDEN / name / "model.gguf"), load_file(GOLDEN / name / "model.safetensors")
    assert set(converted.names()) == set(original)
    for tensor, expected in original.items():
        assert converted.shape(tensor) == expected.shape
        # The converter adds 1 to Gemma's norms.
        tolerance = 2e-7 if name.startswith("gemma") and "norm" in tensor else 0
        np.testing.assert_allclose(converted.read(tensor), expected, rtol=0, atol=tolerance)


def write(path, tensors, metadata=None):
    """Writes a GGUF file. tensors: (type, bytes or numbers) by name."""
    metadata = {"general.architecture": "llama"} | (metadata or {})
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        entry = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), entry)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind, shape):
    """Random quantized numbers: bytes whose float16 scales, at the blocks' ends, are finite."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
    scales = generator.uniform(0.01, 2, (*data.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    where = slice(-2, None) if kind == "Q6_K" else slice(4)
    data[..., where] = scales[..., : len(range(width)[where])]
    return data.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_numbers_are_read_in_any_slice(kind, tmp_path):
    shape = (3, 8, 512)
    path = write(tmp_path / "x.gguf", {"first": ("F32", np.ones(3, np.float32)), "x": (kind, blocks(kind, shape))})
    (found,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "x"]
    whole = gguf.dequantize(found.data, found.tensor_type)
    assert np.isfinite(whole).all()
    assert len(np.unique(whole)) > 1000
    stored = gguf_file.read(path).tensors["x"]
    np.testing.assert_array_equal(stored.read(slice(None)), whole.reshape(-1, 512))

    expert = GgufTensor(stored, "BF16", expert=2)
    np.testing.assert_array_equal(expert.read((slice(2, 5), slice(100, 301))), whole[2, 2:5, 100:301])
    np.testing.assert_array_equal(expert.read_rows([7, 0, 7]), whole[2, [7, 0, 7]])
    transposed = GgufTensor(stored, "BF16", expert=1, transposed=True)
    np.testing.assert_array_equal(transposed.read((slice(100, 301), slice(2, 5))), whole[1, 2:5, 100:301].T)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q8_0"])
def test_dequantization_agrees_with_transformers_in_float64(kind):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.integrations.gguf.dequant")
    data, number = blocks(kind, (16, 512)), gguf.GGMLQuantizationType[kind]
    expected = theirs.dequantize(torch.tensor(data.reshape(-1)), int(number), torch.float64).numpy().reshape(16, 512)
    np.testing.assert_allclose(gguf.dequantize(data, number), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_other_numbers_keep_their_dtype(kind, dtype, tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(dtype)
    path = write(tmp_path / "x.gguf", {"x": (kind, values.view(np.uint8) if kind == "BF16" else values)})
    read = gguf_file.read(path).tensors["x"].read(slice(1, 3))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values[1:3])


def test_rows_of_a_file_larger_than_memory_are_read(tmp_path):
    rows, width = 2**32, 32
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor_info("x", (rows, width // 32 * 34), np.dtype(np.uint8), rows * 34, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    try:
        os.truncate(path, path.stat().st_size + rows * 34 + 64)  # A sparse file takes no disk space.
    except OSError:
        pytest.skip("the file system does not support sparse files of this size")
    np.testing.assert_array_equal(gguf_file.read(path).tensors["x"].read(slice(2**31, 2**31 + 2)), np.zeros((2, 32)))


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_llama_cpps(name):
    case = TOKENS[name]
    file = gguf_file.read(GOLDEN / case["file"])
    tokenizer = gguf_tokenizer.build(file._replace(metadata=file.metadata | case["changes"]))
    for text, expected in zip(make_gguf.TEXTS, case["alone"], strict=True):
        if name in ("gpt-4o", "tekken") and "\u0301" in text:
            continue  # llama.cpp leaves marks out of these models' expressions.
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
    assert tokenizer("x")["input_ids"] == case["around"]


def test_every_way_to_split_a_text_was_compared_or_is_another_name_of_one():
    compared = {gguf_tokenizer._SPLITS[name] for name in make_gguf.SPLITS}
    assert compared == set(gguf_tokenizer._SPLITS.values())


@pytest.mark.parametrize("path", [BYTE_LEVEL, SENTENCEPIECE], ids=lambda path: path.stem)
def test_a_saved_tokenizer_reads_and_writes_as_before(path, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(path, ["<a_0>", "<b_1>"])
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*make_gguf.TEXTS, "a red<a_0><b_1> ink"):
        tokens = tokenizer(text)["input_ids"]
        assert saved(text)["input_ids"] == tokens
        assert saved.decode(tokens) == tokenizer.decode(tokens)
    assert tokenizer.convert_tokens_to_ids("<a_0>") == tokenizer.vocab_size  # Not after the table's unused rows.


def changed(without=(), **changes):
    """BYTE_LEVEL without some tensors, and with other metadata. None removes a key."""

    def write_changed(path):
        metadata = gguf_file.read(BYTE_LEVEL).metadata | {key.replace("__", "."): changes[key] for key in changes}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        tensors = {x.name: (x.tensor_type.name, x.data) for x in gguf.GGUFReader(BYTE_LEVEL).tensors}
        write(path, {name: tensors[name] for name in tensors if name not in without}, metadata)

    return write_changed


def with_bytes(position, content):
    def change(path):
        data = bytearray(BYTE_LEVEL.read_bytes())
        data[position : position + len(content)] = content
        path.write_bytes(data)

    return change


def renamed(old, new):
    return lambda path: path.write_bytes(BYTE_LEVEL.read_bytes().replace(old, new))


def of_type(kind, data):
    return lambda path: write(path, {"token_embd.weight": (kind, data)})


BAD_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "x.gguf: the file is empty; "),
    "another format": (with_bytes(0, b"PK\x03\x04"), "x.gguf: is not a GGUF file, .*; "),
    "an old version": (with_bytes(4, struct.pack("<I", 1)), "x.gguf: has version 1 of the format, "),
    "big-endian": (with_bytes(4, struct.pack(">I", 3)), "x.gguf: is in big-endian order, "),
    "truncated in the metadata": (
        lambda path: path.write_bytes(BYTE_LEVEL.read_bytes()[:3000]),
        "x.gguf: is not a complete GGUF file .*; copy or download it again",
    ),
    "truncated in the weights": (
        lambda path: path.write_bytes(BYTE_LEVEL.read_bytes()[:-100]),
        r"x.gguf: is not a complete GGUF file \(it ends before output_norm.weight does\); ",
    ),
    "an endless list": (with_bytes(16, struct.pack("<Q", 2**60)), "x.gguf: is not a complete GGUF file .*; "),
    "no architecture": (changed(general__architecture=""), "x.gguf:general.architecture: '' is not supported; "),
    "another architecture": (
        changed(general__architecture="mamba"),
        "x.gguf:general.architecture: 'mamba' is not supported; use a model of one of gemma2, .*, llama, .*, smollm3$",
    ),
    "a part": (changed(split__count=3), "x.gguf: is one of 3 parts of a model; .* `llama-gguf-split --merge`"),
    "a key that is missing": (changed(llama__block_count=None), "x.gguf:llama.block_count: is missing; "),
    "a key of another type": (changed(llama__block_count="two"), "x.gguf:llama.block_count: is not a number; "),
    "a size that no model has": (
        changed(llama__block_count=20_000),
        "x.gguf:num_hidden_layers: can't be more than 10,000",
    ),
    "an option that changes the model": (
        changed(llama__attention__causal=False),
        "x.gguf:llama.attention.causal: False is not supported; ",
    ),
    "another rope": (
        changed(llama__rope__scaling__type="longrope"),
        "x.gguf:llama.rope.scaling.type: 'longrope' is not supported; ",
    ),
    "no heads": (changed(llama__attention__head_count=0), r"x.gguf: Transformers rejects it \(.*\); "),
    "no layers": (
        changed(llama__block_count=0),
        "config.backbone.checkpoint: its config does not describe a llama ",
    ),
    "an unknown type": (
        of_type("Q2_K", np.zeros((2, 84), np.uint8)),
        "x.gguf:token_embd.weight: has the tensor type Q2_K; use a file of F32, .*, Q6_K, such as ",
    ),
    "no embeddings": (
        renamed(b"token_embd.weight", b"token_embx.weight"),
        "x.gguf:token_embd.weight: the tensor is missing; ",
    ),
    "a tensor that nobody would read": (
        renamed(b"blk.0.attn_norm.weight", b"blk.0.attn_nurm.weight"),
        "x.gguf:blk.0.attn_nurm.weight: a llama model here has no such tensor; ",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_can_not_be_used_is_refused_in_one_line(change, message, tmp_path):
    path = tmp_path / "x.gguf"
    change(path)
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
        families.transformer_config(Checkpoint(path).config, max_length=1)
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_missing_has_its_name_in_a_checkpoint(tmp_path):
    changed(without=["blk.1.ffn_up.weight"])(tmp_path / "x.gguf")
    checkpoint = Checkpoint(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"x.gguf:model.layers.1.mlp.up_proj.weight: the tensor is missing; "):
        checkpoint.require("model.layers.1.mlp.up_proj.weight", (64, 32))
    with pytest.raises(UserError, match=r"down_proj.weight: has shape \[32, 64\], but its metadata implies \[9, 9\]; "):
        checkpoint.require("model.layers.1.mlp.down_proj.weight", (9, 9))


BAD_TOKENIZERS = {
    "no tokenizer": ({"model": "none"}, ":tokenizer.ggml.model: 'none' is not supported; .* gpt2, llama, or "),
    "another split": ({"pre": "jais"}, ":tokenizer.ggml.pre: 'jais' is not supported; .* one of gpt-2, .*, tekken, or"),
    "no tokens": ({"tokens": 3}, ":tokenizer.ggml.tokens: is no list of tokens; "),
    "a merge of unknown tokens": ({"merges": ["xx yy"]}, r": its tokenizer can't be read \(.*\); copy or download"),
    "half a merge": ({"merges": ["x"]}, r": its tokenizer can't be read \(.*\); "),
    "a special token that is none": ({"bos_token_id": 10**6}, r": its tokenizer can't be read \(.*\); "),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_a_tokenizer_that_can_not_be_used_is_refused_in_one_line(changes, message):
    file = gguf_file.read(BYTE_LEVEL)
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=f"^{BYTE_LEVEL}{message}"):
        gguf_tokenizer.build(file._replace(metadata=file.metadata | changes))


def test_a_folder_with_nothing_but_a_gguf_file_names_the_file(tmp_path):
    shutil.copy(BYTE_LEVEL, tmp_path / "x.gguf")
    with pytest.raises(UserError, match=f"^{tmp_path}/x.gguf: is a GGUF file; give the file instead of its folder"):
        read_config(tmp_path)


def test_a_file_is_found_like_a_folder(tmp_path):
    assert checkpoint_path(str(BYTE_LEVEL)) == BYTE_LEVEL
    with pytest.raises(UserError, match=f"^{tmp_path}/x.gguf: no such file; check config.backbone.checkpoint"):
        checkpoint_path(f"{tmp_path}/x.gguf")


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_smollm2_knows_the_capital_of_france(root):
    path = root / "workdirs" / "smollm2-135m-instruct.gguf"
    if not path.exists():
        pytest.skip(f"make {path.relative_to(root)}")
    checkpoint, tokenizer = Checkpoint(path), load_tokenizer(path)
    config = families.transformer_config(checkpoint.config, max_length=8)
    tokens = tokenizer("The capital of France is")["input_ids"]
    table = checkpoint.read("model.embed_tokens.weight")
    positions = np.arange(len(tokens))[None]
    states = load_transformer(checkpoint, config, "float32")(table[tokens][None], np.ones_like(positions), positions)
    assert tokenizer.decode(int((table @ np.asarray(states[0, -1])).argmax())) == " Paris"


def test_no_damage_of_the_header_leads_to_another_error(tmp_path):
    """Whatever is wrong: a line, or a model that differs. Never another exception, nor a loop without end."""
    path, whole = tmp_path / "x.gguf", BYTE_LEVEL.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[generator.integers(0, 12_000)] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            Checkpoint(path)
            load_tokenizer(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5
