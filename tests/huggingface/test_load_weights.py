"""Checkpoint tensors become a decoder's stacked parameters, on any devices."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, load_weights
from simgr_jax.huggingface.checkpoint import Checkpoint
from tests import virtual_devices

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY, EXPERTS = 3, 16, 4, 2, 8, 24, 40, 4
QUERY, KEY = HEADS * HEAD, KV_HEADS * HEAD
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
ATTENTION = {"q_proj": (QUERY, WIDTH), "k_proj": (KEY, WIDTH), "v_proj": (KEY, WIDTH), "o_proj": (WIDTH, QUERY)}
MLP = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
NORMS = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}


def weights(prefix, shapes):
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def llama_like(layer, embedding=VOCABULARY):
    """The shapes of a whole checkpoint, given the shapes of one layer."""
    shapes = {"model.embed_tokens.weight": (embedding, WIDTH), "model.norm.weight": (WIDTH,)}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


LLAMA = llama_like(NORMS | weights("self_attn.", ATTENTION) | weights("mlp.", MLP))
FUSED = {"self_attn.qkv_proj": (QUERY + 2 * KEY, WIDTH), "self_attn.o_proj": (WIDTH, QUERY)}
FUSED |= {"mlp.gate_up_proj": (2 * INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
PHI3 = llama_like(NORMS | weights("", FUSED))
MIXTURE = weights("self_attn.", ATTENTION | {"q_norm": (HEAD,), "k_norm": (HEAD,)})
MIXTURE |= {"mlp.gate.weight": (EXPERTS, WIDTH)}
MIXTURE |= {name: shape for e in range(EXPERTS) for name, shape in weights(f"mlp.experts.{e}.", MLP).items()}
QWEN3_MOE = llama_like(NORMS | MIXTURE)
GPT2_LAYER = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
GPT2_LAYER |= {"mlp.c_fc": (WIDTH, INNER), "mlp.c_proj": (INNER, WIDTH), "ln_1": (WIDTH,), "ln_2": (WIDTH,)}
GPT2 = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (32, WIDTH), "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
for i in range(LAYERS):
    for name, shape in GPT2_LAYER.items():
        GPT2 |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}

FAMILIES = {
    "llama": (CONFIG, LLAMA),
    "phi3": (CONFIG | {"pad_token_id": 0}, PHI3),
    "qwen3_moe": (
        CONFIG | {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        QWEN3_MOE,
    ),
    "gpt2": (
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": 32,
            "vocab_size": VOCABULARY,
        },
        GPT2,
    ),
}


def write(folder, family="llama", dtype=np.float32, config=(), shapes=()):
    """Writes a random checkpoint to one file; returns its tensors."""
    family_config, family_shapes = FAMILIES[family]
    (folder / "config.json").write_text(json.dumps({"model_type": family} | family_config | dict(config)))
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in (family_shapes | dict(shapes)).items() if shape is not None}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load_transformer(folder, param_dtype="float32", shardings=None):
    checkpoint = Checkpoint(folder)
    config = families.transformer_config(checkpoint.config, max_length=16)
    return load_weights.load_transformer(checkpoint, config, param_dtype, shardings)


def parameters(backbone):
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(backbone))}


def stack(tensors, name):
    """The same tensor of all layers, stacked."""
    return np.stack([tensors[name.format(i)] for i in range(LAYERS)])


def swap(x):
    return x.swapaxes(-1, -2)


def llama_parameters(tensors):
    expected = {"final_norm.scale": tensors["model.norm.weight"]}
    expected["layers.0.pre_attention_norm.scale"] = stack(tensors, "model.layers.{}.input_layernorm.weight")
    expected["layers.0.pre_mlp_norm.scale"] = stack(tensors, "model.layers.{}.post_attention_layernorm.weight")
    for module, names in (("self_attn", ATTENTION), ("mlp", MLP)):
        for name in names:
            kernel = swap(stack(tensors, f"model.layers.{{}}.{module}.{name}.weight"))
            expected[f"layers.0.{module}.{name}.kernel"] = kernel
    return expected


def phi3_parameters(tensors):
    qkv = swap(stack(tensors, "model.layers.{}.self_attn.qkv_proj.weight"))
    gate_up = swap(stack(tensors, "model.layers.{}.mlp.gate_up_proj.weight"))
    return {
        "layers.0.self_attn.q_proj.kernel": qkv[..., :QUERY],
        "layers.0.self_attn.k_proj.kernel": qkv[..., QUERY : QUERY + KEY],
        "layers.0.self_attn.v_proj.kernel": qkv[..., QUERY + KEY :],
        "layers.0.mlp.gate_proj.kernel": gate_up[..., :INNER],
        "layers.0.mlp.up_proj.kernel": gate_up[..., INNER:],
    }


def qwen3_moe_parameters(tensors):
    expected = {"layers.0.mlp.router.kernel": swap(stack(tensors, "model.layers.{}.mlp.gate.weight"))}
    for name in MLP:
        experts = [stack(tensors, f"model.layers.{{}}.mlp.experts.{e}.{name}.weight") for e in range(EXPERTS)]
        expected[f"layers.0.mlp.{name}.kernel"] = swap(np.stack(experts, axis=1))
    return expected


def gpt2_parameters(tensors):
    kernel, bias = stack(tensors, "h.{}.attn.c_attn.weight"), stack(tensors, "h.{}.attn.c_attn.bias")
    expected = {"position_embedding": tensors["wpe.weight"], "final_norm.bias": tensors["ln_f.bias"]}
    expected["layers.0.mlp.up_proj.kernel"] = stack(tensors, "h.{}.mlp.c_fc.weight")
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        expected[f"layers.0.self_attn.{name}.kernel"] = np.split(kernel, 3, axis=-1)[number]
        expected[f"layers.0.self_attn.{name}.bias"] = np.split(bias, 3, axis=-1)[number]
    return expected


@pytest.mark.parametrize("piece_bytes", [load_weights._PIECE_BYTES, 200])
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", llama_parameters),
        ("phi3", phi3_parameters),
        ("qwen3_moe", qwen3_moe_parameters),
        ("gpt2", gpt2_parameters),
    ],
)
def test_every_layers_tensors_are_stacked(tmp_path, monkeypatch, family, expected, piece_bytes):
    monkeypatch.setattr(load_weights, "_PIECE_BYTES", piece_bytes)
    tensors = write(tmp_path, family)
    loaded = parameters(load_transformer(tmp_path))
    for path, array in expected(tensors).items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=path)


def test_a_loaded_decoder_computes_finite_states(tmp_path):
    write(tmp_path)
    backbone = load_transformer(tmp_path)
    hidden = backbone(jnp.ones((1, 4, WIDTH)), jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None])
    assert hidden.shape == (1, 4, WIDTH)
    assert np.isfinite(hidden).all()


@pytest.mark.parametrize("in_file", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_are_rounded_once_to_the_requested_dtype(tmp_path, in_file, param_dtype):
    tensors = write(tmp_path, dtype=in_file)
    loaded = parameters(load_transformer(tmp_path, param_dtype))
    for path, array in llama_parameters(tensors).items():
        assert loaded[path].dtype == param_dtype
        np.testing.assert_array_equal(loaded[path], array.astype(param_dtype), err_msg=path)


def on_one_device(variable):
    """A sharding for several devices, used with one."""
    mesh, axes = jax.make_mesh((1, 1), ("fsdp", "tensor")), variable.get_value().ndim
    layers = (None,) if axes > 1 else ()
    return NamedSharding(mesh, PartitionSpec(*layers, *("fsdp", "tensor")[: axes - len(layers)]))


@pytest.mark.parametrize("shardings", [None, on_one_device])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_read_in_pieces_and_no_byte_is_read_twice(tmp_path, monkeypatch, family, shardings):
    tensors = write(tmp_path, family)
    limit = 4 * INNER * WIDTH if family == "qwen3_moe" else 4 * 2 * (3 * WIDTH)  # An expert, or two rows.
    monkeypatch.setattr(load_weights, "_PIECE_BYTES", limit)
    sizes, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *args: sizes.append((x := read(*args)).nbytes) or x)
    load_transformer(tmp_path, shardings=shardings)
    assert max(sizes) <= limit
    embedding = "wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert sum(sizes) == sum(x.nbytes for x in tensors.values()) - tensors[embedding].nbytes


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_of_the_embedding_are_read_as_float32(tmp_path, dtype):
    tensors = write(tmp_path, dtype=dtype)
    rows = load_weights.read_embedding_rows(Checkpoint(tmp_path), [5, 39, 0])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, tensors["model.embed_tokens.weight"][[5, 39, 0]].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_statistics_of_the_embedding_equal_numpys(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(load_weights, "_PIECE_BYTES", 7 * WIDTH * 8)
    embedding = write(tmp_path, dtype=dtype)["model.embed_tokens.weight"].astype(np.float64)
    mean, deviation = load_weights.embedding_statistics(Checkpoint(tmp_path))
    assert mean.dtype == deviation.dtype == np.float32
    np.testing.assert_allclose(mean, embedding.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(deviation, embedding.std(axis=0), rtol=1e-6)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
MISFITS = {
    "missing tensor": ("llama", {}, {Q_PROJ: None}, f"model.safetensors:{Q_PROJ}: the tensor is missing; use"),
    "wrong shape": ("llama", {}, {Q_PROJ: (QUERY, WIDTH + 1)}, rf":{Q_PROJ}: has shape \[32, 17\].* \[32, 16\]; use"),
    "transposed": ("llama", {}, {Q_PROJ: (WIDTH, QUERY)}, rf":{Q_PROJ}: has shape \[16, 32\].* \[32, 16\]; use"),
    "missing layer": ("llama", {"num_hidden_layers": 4}, {}, "model.layers.3.*: the tensor is missing; use"),
    "fused too long": (
        "phi3",
        {},
        {"model.layers.2.self_attn.qkv_proj.weight": (QUERY + 3 * KEY, WIDTH)},
        r"layers.2.self_attn.qkv_proj.weight: has shape \[80, 16\].* implies \[64, 16\]; use",
    ),
    "missing expert": (
        "qwen3_moe",
        {},
        {"model.layers.0.mlp.experts.3.up_proj.weight": None},
        "experts.3.up_proj.weight: the tensor is missing; use",
    ),
}


@pytest.mark.parametrize(("family", "config", "shapes", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_match_the_config_are_refused_before_any_is_read(
    tmp_path, monkeypatch, family, config, shapes, message
):
    write(tmp_path, family, config=config, shapes=shapes)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=message):
        load_transformer(tmp_path)


def test_quantised_weights_are_refused_before_any_is_read(tmp_path, monkeypatch):
    tensors = write(tmp_path)
    save_file(tensors | {Q_PROJ: np.zeros((QUERY, WIDTH), np.int8)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=f"{Q_PROJ}: has dtype I8; quantised weights are not supported"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("use", [lambda c: load_weights.read_embedding_rows(c, [0]), load_weights.embedding_statistics])
def test_an_embedding_that_does_not_match_the_config_is_refused(tmp_path, use):
    write(tmp_path, shapes={"model.embed_tokens.weight": (VOCABULARY + 1, WIDTH)})
    with pytest.raises(UserError, match=r"embed_tokens.weight: has shape \[41, 16\], .* implies \[40, 16\]; use"):
        use(Checkpoint(tmp_path))


def run_sharded(folder, processes, sharding):
    """Loads `folder` in several processes with 8 devices in total; returns what `sharded_load.py` prints in each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = virtual_devices.environment(8 // processes) | virtual_devices.UNCACHED
    command = [sys.executable, "-m", "tests.huggingface.sharded_load", folder, sharding, str(port), str(processes)]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen([*command, str(rank)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_a_process_reads_each_byte_once_for_all_its_devices(tmp_path):
    tensors = write(tmp_path, "llama")
    (report,) = run_sharded(tmp_path, 1, "fsdp")
    assert report["sharded_parameters"] > 6
    assert report["bytes_read"] == sum(x.nbytes for name, x in tensors.items() if "embed" not in name)


@pytest.mark.slow
def test_a_process_reads_only_what_its_devices_hold(tmp_path):
    tensors = write(tmp_path, "qwen3_moe")
    reports = run_sharded(tmp_path, 2, "all")
    everywhere = sum(x.nbytes for name, x in tensors.items() if "norm" in name)  # Norms are on every device.
    whole = sum(x.nbytes for name, x in tensors.items() if "embed" not in name)
    for report in reports:
        assert report["sharded_parameters"] > 6
        assert report["bytes_read"] == everywhere + (whole - everywhere) / 2
