"""Model folders: tensors and slices are read as they were written, and broken folders are refused in one line."""

import json
import shutil
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from simgr_jax.errors import UserError
from simgr_jax.hub import local_folder
from simgr_jax.huggingface.checkpoint import Checkpoint

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 12,
}
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "model.embed_tokens.weight": np.arange(96, dtype=np.float32).reshape(12, 8),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    },
    "model-00002-of-00002.safetensors": {"model.norm.weight": np.arange(8).astype(ml_dtypes.bfloat16)},
}
FIRST, SECOND = SHARDS
INDEX = "model.safetensors.index.json"


def write_index(folder, changes=None):
    weight_map = {name: shard for shard, tensors in SHARDS.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | (changes or {})}))


def write_safetensors(path, header, data):
    """Writes files that the library would refuse to write."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def tensor(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint of two shards."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in SHARDS.items():
        save_file(tensors, tmp_path / name)
    write_index(tmp_path)
    return tmp_path


def test_tensors_of_all_shards_are_read_as_they_were_written(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.hidden_size == 8
    written = SHARDS[FIRST] | SHARDS[SECOND]
    assert set(checkpoint.names()) == set(written)
    for name, array in written.items():
        read = checkpoint.read(name)
        assert read.dtype == array.dtype
        assert checkpoint.shape(name) == array.shape
        np.testing.assert_array_equal(read, array)


def test_a_single_file_needs_no_index(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(SHARDS[FIRST], tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path).names()) == set(SHARDS[FIRST])


@pytest.mark.parametrize("index", [(slice(2, 5),), (slice(0, 12), slice(3, 4)), (slice(11, 12), slice(0, 8))])
def test_slices_equal_slices_of_the_whole_tensor(folder, index):
    whole = SHARDS[FIRST]["model.embed_tokens.weight"]
    np.testing.assert_array_equal(Checkpoint(folder).read("model.embed_tokens.weight", index), whole[index])


def test_rows_are_returned_in_the_given_order(folder):
    rows = [7, 0, 11, 7]
    whole = SHARDS[FIRST]["model.embed_tokens.weight"]
    np.testing.assert_array_equal(Checkpoint(folder).read_rows("model.embed_tokens.weight", rows), whole[rows])
    with pytest.raises(IndexError, match="12"):
        Checkpoint(folder).read_rows("model.embed_tokens.weight", [3, 12])


def test_a_slice_of_a_file_larger_than_memory_is_read(tmp_path):
    size = 2**40
    header = json.dumps({"big": tensor("F32", [size // 32, 8], 0, size)}).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    try:
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)  # A sparse file takes no disk space.
    except OSError:
        pytest.skip("the file system does not support sparse files of this size")
    np.testing.assert_array_equal(Checkpoint(tmp_path).read("big", (slice(2**30, 2**30 + 2),)), np.zeros((2, 8)))


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def shard(header, data=b""):
    return lambda folder: write_safetensors(folder / FIRST, header, data)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-4])


def pickles_only(folder):
    remove(FIRST, SECOND, INDEX)(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


BROKEN = {
    "no config": (remove("config.json"), "config.json: no such file; give the folder of a Hugging Face model"),
    "config is not JSON": (text("config.json", '{"model_type":\n'), "config.json:2: not JSON .*; copy"),
    "no model type": (text("config.json", "{}"), "config.json:model_type: .*llama"),
    "unknown model type": (config(model_type="dit"), "config.json:model_type: 'dit' is not supported; use .*llama"),
    "remote code": (
        config(model_type="x", auto_map={"AutoConfig": "c.X"}),
        "config.json:model_type: 'x' is not supported; use .*llama",
    ),
    "refused by Transformers": (config(hidden_size="big"), "config.json: Transformers rejects it .*hidden_size.*; "),
    "a hundred million layers": (
        config(num_hidden_layers=100_000_000),
        "config.json:num_hidden_layers: can't be more than 10,000; copy the model's config again",
    ),
    "a hundred million experts in a config within": (
        config(model_type="gemma3", text_config={"num_experts": 1e8}),
        "config.json:num_experts: can't be more than 10,000; copy the model's config again",
    ),
    "a billion labels": (
        config(num_labels=10**9),
        "config.json:num_labels: can't be more than 100,000; copy the model's config again",
    ),
    "heads of a billion dimensions": (
        config(head_dim=10**9),
        "config.json:head_dim: can't be more than 100,000; copy the model's config again",
    ),
    "a head that rotates more than whole": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e6}),
        "config.json:partial_rotary_factor: can't be more than 1; copy",
    ),
    "a number in a list that no model has": (
        config(anything=[{"inside": -(10**9)}]),
        "config.json:inside: can't be more than 16,777,216; copy",
    ),
    "an epsilon that is no number": (config(rms_norm_eps=float("nan")), "config.json:rms_norm_eps: can't be nan; copy"),
    "an infinite base": (config(rope_theta=float("inf")), "config.json:rope_theta: can't be inf; copy"),
    "an integer of 5,000 digits": (
        text("config.json", f'{{"model_type": "llama", "vocab_size": {"1" * 5000}}}'),
        "config.json: has a number too long to read .*; check",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "fp8"}),
        "config.json:quantization_config: quantised weights are not supported, use the float32",
    ),
    "no weights": (
        remove(FIRST, SECOND, INDEX),
        "model.safetensors: no such file; copy the model's safetensors weights",
    ),
    "pickle only": (pickles_only, "pytorch_model.bin: is a pickle.*; if you trust it, convert it .*save_pretrained"),
    "shards without index": (remove(INDEX), "model.safetensors.index.json: no such file; copy it to the folder of"),
    "broken index": (text(INDEX, '{"weight_map": {'), "index.json:1: not JSON .*; copy"),
    "index without map": (text(INDEX, "{}"), "index.json:weight_map: does not map tensors to files; copy"),
    "index of numbers": (
        text(INDEX, '{"weight_map": {"a": 1}}'),
        "index.json:weight_map: does not map tensors to files; copy",
    ),
    "index leads out of the folder": (
        lambda folder: write_index(folder, {"half": f"../{folder.name}/{FIRST}"}),
        f"index.json:weight_map: '../.*/{FIRST}' is not a file's name; copy",
    ),
    "index leads to a path": (
        lambda folder: write_index(folder, {"half": str(folder / FIRST)}),
        f"index.json:weight_map: '/.*/{FIRST}' is not a file's name; copy",
    ),
    "index leads to the folder above": (
        lambda folder: write_index(folder, {"half": ".."}),
        "index.json:weight_map: '..' is not a file's name; copy",
    ),
    "missing shard": (remove(SECOND), f"{SECOND}: no such file; copy it there .*index.json lists it"),
    "index lists a missing shard": (
        lambda folder: write_index(folder, {"half": "other.safetensors"}),
        "other.safetensors: no such file; copy it there .*index.json lists it",
    ),
    "index lists another tensor": (
        lambda folder: write_index(folder, {"lost": SECOND}),
        f"index.json:lost: the tensor is not in .*{SECOND}; copy",
    ),
    "truncated": (truncate, f"{FIRST}: is not a complete safetensors file .*; copy or download"),
    "empty": (text(FIRST, ""), f"{FIRST}: the file is empty; copy"),
    "git-lfs pointer": (
        text(FIRST, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 96\n"),
        f"{FIRST}: is not a complete safetensors file .*; .*git lfs pull",
    ),
    "garbage header": (shard(b"\x93garbage", bytes(64)), f"{FIRST}: is not a complete safetensors file .*; copy"),
    "offsets beyond the end": (
        shard({"half": tensor("F32", [4, 4], 0, 64)}, bytes(32)),
        f"{FIRST}: is not a complete safetensors file .*; copy",
    ),
    "overlapping tensors": (
        shard({"half": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
        f"{FIRST}: is not a complete safetensors file .*; copy",
    ),
    "more elements than bytes": (
        shard({"half": tensor("F32", [2**40, 2**40], 0, 8)}, bytes(8)),
        f"{FIRST}: is not a complete safetensors file .*; copy",
    ),
    "unknown dtype": (
        shard({"half": tensor("Q4_K", [2], 0, 8)}, bytes(8)),
        f"{FIRST}: has a tensor of dtype Q4_K; quantised weights are not supported, use",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_refused_in_one_line_when_it_is_opened(folder, damage, message):
    Checkpoint(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "F64"])
def test_a_tensor_of_an_unsupported_dtype_is_refused_only_when_it_is_used(folder, dtype):
    size = 8 if dtype == "F64" else 1
    write_safetensors(
        folder / FIRST,
        {"model.embed_tokens.weight": tensor("F32", [1, 8], 0, 32), "half": tensor(dtype, [4], 32, 32 + 4 * size)},
        bytes(32 + 4 * size),
    )
    checkpoint = Checkpoint(folder)  # Some checkpoints keep masks, which do no harm unless they are read.
    for use in (checkpoint.read, checkpoint.shape, lambda name: checkpoint.require(name, (4,))):
        with pytest.raises(UserError, match=f"{FIRST}:half: has dtype {dtype}; quantised weights are not supported"):
            use("half")


def test_a_required_tensor_must_exist_and_have_the_required_shape(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.require("half", (2, 3))
    with pytest.raises(UserError, match=rf"{FIRST}:half: has shape \[2, 3\], but .* implies \[3, 2\]; use"):
        checkpoint.require("half", (3, 2))
    with pytest.raises(UserError, match=r"index\.json:lost: the tensor is missing; use"):
        checkpoint.require("lost", (3, 2))


def test_a_local_folder_is_used_as_it_is(tmp_path):
    assert local_folder(str(tmp_path), "config.backbone.checkpoint") == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder"])
def test_a_name_that_is_neither_a_folder_nor_an_id_is_refused(name):
    with pytest.raises(UserError, match=f"config.backbone.checkpoint: {name} is not a folder, .*; check the name"):
        local_folder(name, "config.backbone.checkpoint")


def test_neither_pickles_nor_code_are_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **patterns):
        asked.update(patterns)
        return shutil.copytree(tmp_path, tmp_path.parent / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("downloaded", "key").is_dir()
    good = ["config.json", "tokenizer.json", "merges.txt", "spiece.model", "model-00001-of-00002.safetensors", INDEX]
    bad = ["pytorch_model.bin", "modeling.py", "original/consolidated.00.pth", "x.pkl", "consolidated.safetensors"]
    assert list(filter_repo_objects(good + bad, **asked)) == good
