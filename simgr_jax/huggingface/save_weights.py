"""Writes a trained decoder to a folder that Transformers can load: the reverse of `load_weights`, without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from simgr_jax.huggingface import export_config, families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.families import Source, qwen3_moe
from simgr_jax.huggingface.llm_tokenizer import save_tokenizer
from simgr_jax.huggingface.load_weights import embedding_name, per_layer_embedding_name
from simgr_jax.models import lora
from simgr_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16")

# The most bytes in one file of weights; a larger tensor gets its own file. The host holds one file's tensors at a time.
_SHARD_BYTES = 4 * 10**9

_HEAD = "lm_head.weight"
Tensors = Iterator[tuple[str, np.ndarray]]


class TrainedTokens(NamedTuple):
    """Tokens whose embeddings were trained.

    Attributes:
      strings: the semantic-ID tokens, as the tokenizer spells them.
      embedding: rows for `strings`.
      text_tokens: the checkpoint's own tokens whose embeddings were trained; the others keep theirs.
      text_embedding: rows for `text_tokens`, if there are any; as those of `load_weights.read_input_rows`.
    """

    strings: Sequence[str]
    embedding: Float[Array, "V D"]
    text_tokens: Sequence[int] = ()
    text_embedding: Float[Array, "W E"] | None = None


def save_finetuned(
    folder: Path,
    checkpoint: Checkpoint,
    backbone: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TrainedTokens,
    dtype: str | None = None,
) -> None:
    """Writes config, weights and tokenizer of a decoder fine-tuned from `checkpoint`, in the checkpoint's layout.

    Adapters are merged into the weights. The embedding table grows to the tokenizer's size if it is smaller. A
    language-model head that is not tied to the table is copied from the checkpoint; its rows for the new tokens are
    their embeddings, because training moves user states close to those. A checkpoint without a head gets one that is
    tied. Embeddings for each layer are zero for the new tokens. Nothing else in a checkpoint is written: buffers are
    left out, and so is all of a multimodal model but its language model. A mixture's experts have one tensor each,
    which all versions of Transformers read.

    Args:
      folder: must exist.
      tokenizer: must contain the tokens' strings.
      dtype: one of DTYPES; None keeps each tensor's dtype in the checkpoint (`Checkpoint.dtype`).

    Raises:
      UserError: the checkpoint's head does not have the shape of its table.
    """
    prefix = families.prefix(checkpoint.config, checkpoint.names())
    new_prefix = "model." if export_config.is_multimodal(checkpoint) else prefix
    table, head, per_layer = embedding_name(checkpoint), _untied_head(checkpoint), per_layer_embedding_name(checkpoint)
    if head:
        checkpoint.require(head, checkpoint.shape(table))
    rows = max(checkpoint.shape(table)[0], 1 + max(tokenizer.get_vocab().values()))
    ids = tokenizer.convert_tokens_to_ids(list(tokens.strings))

    def extended(name: str, new: Float[Array, "V _"] | float) -> np.ndarray:
        old = checkpoint.read(name)
        result = np.zeros((rows, old.shape[1]), _dtype(checkpoint, name, dtype))
        result[: len(old)] = old
        result[ids] = new
        return result

    def trained_table(name: str, new: Float[Array, "V _"] | float, columns: slice) -> np.ndarray:
        result = extended(name, new)
        if len(tokens.text_tokens):
            result[tokens.text_tokens] = tokens.text_embedding[:, columns]
        return result

    def tensors() -> Tensors:
        width = backbone.config.width
        yield new_prefix + table.removeprefix(prefix), trained_table(table, tokens.embedding, slice(width))
        if per_layer:
            yield new_prefix + per_layer.removeprefix(prefix), trained_table(per_layer, 0, slice(width, None))
        if head:
            yield _HEAD, extended(head, tokens.embedding)
        for name, value in _decoder_tensors(backbone, families.sources(checkpoint.config)):
            yield new_prefix + name, np.ascontiguousarray(value, _dtype(checkpoint, prefix + name, dtype))

    _write_weights(folder, tensors())
    _write_config(folder, export_config.finetuned(checkpoint, backbone, rows, bool(head), dtype))
    save_tokenizer(tokenizer, folder)


def save_from_scratch(
    folder: Path,
    backbone: Transformer,
    rope_theta: float,
    max_length: int,
    tokens: TrainedTokens,
    dtype: str | None = None,
) -> None:
    """Like `save_finetuned`, for a decoder of `from_scratch_config`: a Llama with the semantic-ID tokens as vocabulary.

    Args:
      max_length: the config's max_position_embeddings; information only, because longer sequences also work.
      dtype: None means float32.
    """
    from transformers import LlamaConfig  # Importing it takes seconds.

    shape = backbone.config
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokens.strings),
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
        yield families.EMBEDDING["llama"], np.asarray(tokens.embedding)
        yield from _decoder_tensors(backbone, families.sources(config))

    as_asked = ((f"model.{name}", np.ascontiguousarray(value, dtype or "float32")) for name, value in tensors())
    _write_weights(folder, as_asked)
    _write_config(folder, export_config.in_both_spellings(json.loads(config.to_json_string()), config))
    save_tokenizer(_codes_tokenizer(tokens.strings), folder)


def _codes_tokenizer(token_strings: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that finds the tokens in a text and skips everything between them."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(token_strings)}))
    tokenizer.pre_tokenizer = Split(Regex("<[a-z]+_[0-9]+>"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _untied_head(checkpoint: Checkpoint) -> str | None:
    """The tensor of the language-model head, or None if the head is the embedding table."""
    if checkpoint.config.tie_word_embeddings:
        return None
    return next((name for name in checkpoint.names() if f".{name}".endswith(f".{_HEAD}")), None)


def _dtype(checkpoint: Checkpoint, name: str, asked: str | None) -> np.dtype:
    """
    Args:
      name: of a tensor in the export.
    """
    if asked:
        return np.dtype(asked)
    return checkpoint.dtype(name if name in checkpoint.names() else qwen3_moe.fused(name))


def _decoder_tensors(backbone: Transformer, sources: Mapping[str, Source]) -> Tensors:
    """The tensors that `sources` names, in float32, with adapters merged; fetched from the devices layer by layer."""
    yield from _assemble(_by_path(backbone, skip="layers"), sources)

    @functools.partial(jax.jit, static_argnums=0)
    def parameters_of(graphdef: nnx.GraphDef, stack: nnx.State, row: int) -> dict[str, Array]:
        block = nnx.merge(graphdef, jax.tree.map(lambda x: x[row].astype(jnp.float32), stack))
        lora.merge(block)
        return _by_path(block)

    for number, (stack, layers) in enumerate(zip(backbone.layers, backbone.config.stacks, strict=True)):
        for row, layer in enumerate(layers):
            with jax.default_matmul_precision("highest"):
                parameters = parameters_of(*nnx.split(stack), row)
            of_layer = {f"layers.{number}.{path}": value for path, value in parameters.items()}
            yield from _assemble(of_layer, sources, layer)


def _by_path(module: nnx.Module, skip: str | None = None) -> dict[str, Array]:
    """The module's arrays by path, except those below `skip`."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable[...] for path, variable in flat if path[0] != skip}


def _assemble(parameters: Mapping[str, Array], sources: Mapping[str, Source], layer: int = 0) -> Tensors:
    """The checkpoint tensors made of the given parameters: one layer's, or those outside the layers."""
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
    """Writes model.safetensors, or several files and an index, with Transformers' file names."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        shard.clear()  # Free it before the next one is gathered.
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
