"""From a trained decoder to a folder that Transformers loads: what `load` does, the other way round, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from simgr_jax.files import read_json_object
from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.families import Source
from simgr_jax.huggingface.load import embedding_name
from simgr_jax.models import lora
from simgr_jax.models.transformer import Transformer

DTYPES = ("float32", "bfloat16")

# Of a file of weights; a larger tensor has one to itself. The host holds no more than one file's at a time.
_SHARD_BYTES = 4 * 10**9

_HEAD = "lm_head.weight"
# Of the language model of a multimodal one.
_TEXT_ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM"}

Tensors = Iterator[tuple[str, np.ndarray]]


def save_finetuned(
    folder: Path,
    checkpoint: Checkpoint,
    backbone: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    token_strings: Sequence[str],
    embedding: Float[Array, "V D"],
    text_tokens: Sequence[int] = (),
    text_embedding: Float[Array, "W D"] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes config, weights and tokenizer of a decoder that began as `checkpoint`, laid out as they are there.

    Adapters are folded in. The embedding table grows to the tokenizer's size where it is shorter. A language-model head
    of its own (not tied to the table) is the checkpoint's, with the new tokens' embeddings as their rows: training puts
    user states near them. Nothing else that a checkpoint may hold is written: no buffers, and of a multimodal model the
    language model alone.

    Args:
      folder: is there.
      tokenizer: has `token_strings` among its tokens.
      embedding: of `token_strings`.
      text_tokens: those of the checkpoint's own tokens whose embeddings were trained; the others keep theirs.
      text_embedding: of `text_tokens`, if there are any.
      dtype: one of DTYPES; None gives each tensor the dtype that it has in the checkpoint.
    """
    prefix = families.prefix(checkpoint.config, checkpoint.names())
    new_prefix = "model." if _is_multimodal(checkpoint) else prefix
    table, head = embedding_name(checkpoint), _untied_head(checkpoint)
    rows = max(checkpoint.shape(table)[0], 1 + max(tokenizer.get_vocab().values()))
    ids = tokenizer.convert_tokens_to_ids(list(token_strings))

    def extended(name: str) -> np.ndarray:
        old = checkpoint.read(name)
        result = np.zeros((rows, old.shape[1]), _dtype(checkpoint, name, dtype))
        result[: len(old)] = old
        result[ids] = embedding
        return result

    def trained_table() -> np.ndarray:
        result = extended(table)
        if len(text_tokens):
            result[text_tokens] = text_embedding
        return result

    def tensors() -> Tensors:
        yield new_prefix + table.removeprefix(prefix), trained_table()
        if head:
            yield _HEAD, extended(head)
        for name, value in _decoder_tensors(backbone, families.sources(checkpoint.config, checkpoint.names())):
            yield new_prefix + name, np.ascontiguousarray(value, _dtype(checkpoint, prefix + name, dtype))

    _write_weights(folder, tensors())
    _write_config(folder, _config(checkpoint, backbone, rows, dtype))
    tokenizer.save_pretrained(folder)


def save_from_scratch(
    folder: Path,
    backbone: Transformer,
    rope_theta: float,
    max_length: int,
    token_strings: Sequence[str],
    embedding: Float[Array, "V D"],
    dtype: str | None = None,
) -> None:
    """As `save_finetuned`, of a decoder of `from_scratch_config`: a Llama whose vocabulary is the semantic-ID tokens.

    Args:
      max_length: of sequences, in positions; only told to the reader, any length can be computed.
      dtype: None is float32.
    """
    shape = backbone.config
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(token_strings),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype or "float32",
    )

    def tensors() -> Tensors:
        yield families.EMBEDDING["llama"], np.asarray(embedding)
        yield from _decoder_tensors(backbone, families.sources(config))

    as_asked = ((f"model.{name}", np.ascontiguousarray(value, dtype or "float32")) for name, value in tensors())
    _write_weights(folder, as_asked)
    _write_config(folder, json.loads(config.to_json_string()))
    _codes_tokenizer(token_strings).save_pretrained(folder)


def _codes_tokenizer(token_strings: Sequence[str]) -> PreTrainedTokenizerFast:
    """Finds the tokens in a text, whatever stands between them."""
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(token_strings)}))
    tokenizer.pre_tokenizer = Split(Regex("<[a-z]+_[0-9]+>"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _is_multimodal(checkpoint: Checkpoint) -> bool:
    return families.text_config(checkpoint.config) is not checkpoint.config


def _untied_head(checkpoint: Checkpoint) -> str | None:
    """The tensor of a language-model head that is not the embedding table itself, if there is one."""
    if checkpoint.config.tie_word_embeddings:
        return None
    return next((name for name in checkpoint.names() if f".{name}".endswith(f".{_HEAD}")), None)


def _dtype(checkpoint: Checkpoint, name: str, asked: str | None) -> np.dtype:
    return np.dtype(asked or checkpoint.read(name, (slice(0, 0),)).dtype)


def _config(checkpoint: Checkpoint, backbone: Transformer, rows: int, dtype: str | None) -> dict[str, Any]:
    """The checkpoint's config.json as it was written, so that versions of Transformers that could read it still can."""
    original = read_json_object(checkpoint.folder / "config.json")
    values = original
    if _is_multimodal(checkpoint):
        kind = families.text_config(checkpoint.config).model_type
        values = (original.get("text_config") or {}) | {
            "model_type": kind,
            "architectures": [_TEXT_ARCHITECTURES[kind]],
            "tie_word_embeddings": checkpoint.config.tie_word_embeddings,
        }
    values["vocab_size"] = rows
    dtype_key = "torch_dtype" if "torch_dtype" in original else "dtype"
    if dtype := dtype or original.get(dtype_key):
        values[dtype_key] = dtype
    if backbone.config.rope != families.transformer_config(checkpoint.config, max_length=1).rope:
        # Phi-3's longrope in its long form, in which it was trained: Transformers would take the short form for prompts
        # that are short enough.
        rope = values.get("rope_parameters") or values["rope_scaling"]
        rope["short_factor"] = rope["long_factor"]
    return values


def _decoder_tensors(backbone: Transformer, sources: Mapping[str, Source]) -> Tensors:
    """The tensors that `sources` name, float32, adapters folded in; a layer at a time is fetched from the devices."""
    yield from _assemble(_by_path(backbone, skip="layers"), sources)
    graphdef, layers = nnx.split(backbone.layers)

    @jax.jit
    def parameters_of(layers: nnx.State, layer: int) -> dict[str, Array]:
        block = nnx.merge(graphdef, jax.tree.map(lambda x: x[layer].astype(jnp.float32), layers))
        lora.merge(block)
        return _by_path(block)

    for layer in range(backbone.config.layers):
        with jax.default_matmul_precision("highest"):
            parameters = parameters_of(layers, layer)
        yield from _assemble({f"layers.{path}": value for path, value in parameters.items()}, sources, layer)


def _by_path(module: nnx.Module, skip: str | None = None) -> dict[str, Array]:
    """The module's arrays by their paths, but for those below `skip`."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable[...] for path, variable in flat if path[0] != skip}


def _assemble(parameters: Mapping[str, Array], sources: Mapping[str, Source], layer: int = 0) -> Tensors:
    """From parameters, of one layer or of none, to the tensors that they are or are parts of."""
    parts: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for path, parameter in parameters.items():
        source, value = sources[path], np.asarray(parameter)
        value = value.swapaxes(-1, -2) if source.transpose else value
        axis, start, _ = source.part or (0, 0, 0)
        for expert, array in enumerate(value if "{expert}" in source.name else [value]):
            parts.setdefault(source.name.format(layer=layer, expert=expert), {})[axis, start] = array
    for name, arrays in parts.items():
        axis, _ = min(arrays)
        yield name, np.concatenate([arrays[key] for key in sorted(arrays)], axis)


def _write_weights(folder: Path, tensors: Tensors) -> None:
    """model.safetensors, or several files and their index, named as Transformers names them."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        shard.clear()  # Before the next is gathered.
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Tensors) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
