"""What llama.cpp's converter makes of each family: its config as metadata, and its tensors under other names and, in
some families, in another order. Here both are turned back into those of a Hugging Face checkpoint.

The `gguf` package knows the names of all architectures' tensors, so a new family is one entry of `_ARCHITECTURES`: its
config, and what the converter (llama.cpp's `conversion/`) does to its numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from jaxtyping import Int, Shaped

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families
from simgr_jax.huggingface.gguf_file import GgufFile, StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBEDDING, _HEAD = "token_embd.weight", "lm_head.weight"
_SPECIAL_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Rotary frequencies, which are a part of the config.
_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
# Keys that say nothing about the decoder, or nothing that its tensors do not say.
_IGNORED_KEYS = {"vocab_size", "attention.value_length", "rope.scaling.finetuned", "pooling_type"}


class _Metadata:
    """The metadata of a file's architecture, and which of it has been read."""

    def __init__(self, file: GgufFile):
        self.file, self.read = file, set(_IGNORED_KEYS)

    def get(self, key: str) -> Any:
        self.read.add(key)
        return self.file.metadata.get(f"{self.file.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> Any:
        """
        Raises:
          UserError: the key has no number, and there is no default.
        """
        found = self.get(key)
        found = default if found is None else found
        if not isinstance(found, int | float):
            problem = "is missing" if found is None else "is not a number"
            raise UserError(
                f"{self._where(key)}: {problem}; convert the model again with llama.cpp, or use another file"
            )
        return found

    def factors(self, name: str) -> list[float]:
        """
        Raises:
          UserError: there is no such tensor.
        """
        if name not in self.file.tensors:
            raise _missing(self.file, name)
        return self.file.tensors[name].read(slice(None)).reshape(-1).astype(float).tolist()

    def unsupported(self, key: str) -> UserError:
        found = self.file.metadata[f"{self.file.architecture}.{key}"]
        return UserError(f"{self._where(key)}: {found!r} is not supported; use another model")

    def require_all_read(self) -> None:
        """
        Raises:
          UserError: a key was not read, so the model may compute what a decoder here does not.
        """
        prefix = f"{self.file.architecture}."
        for key in self.file.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in self.read:
                raise self.unsupported(key.removeprefix(prefix))

    def _where(self, key: str) -> str:
        return f"{self.file.path}:{self.file.architecture}.{key}"


def _decoder(metadata: _Metadata, model_type: str, architecture: str) -> dict[str, Any]:
    """What the configs of all families but GPT-2's share, in the spelling that Transformers 4 and 5 read."""
    number = metadata.number
    width, heads = number("embedding_length"), number("attention.head_count")
    return _model(metadata, model_type, architecture) | {
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", number("rope.dimension_count", width // max(heads, 1))),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(metadata),
    }


def _model(metadata: _Metadata, model_type: str, architecture: str) -> dict[str, Any]:
    file = metadata.file
    if _EMBEDDING not in file.tensors:
        raise _missing(file, _EMBEDDING)
    tokens = {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in _SPECIAL_TOKENS.items()}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": file.tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _DTYPES[file.dtype],
    } | tokens


def _missing(file: GgufFile, name: str) -> UserError:
    return UserError(f"{file.path}:{name}: the tensor is missing; use a file with all weights of a model")


def _rope_scaling(metadata: _Metadata) -> dict[str, Any] | None:
    kind, number = metadata.get("rope.scaling.type"), metadata.number
    if kind == "linear":
        return {"rope_type": "linear", "factor": number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(metadata)
    if kind not in (None, "none"):
        raise metadata.unsupported("rope.scaling.type")
    return _llama3_rope(metadata) if _LLAMA3_FACTORS in metadata.file.tensors else None


def _yarn(metadata: _Metadata) -> dict[str, Any]:
    options = {
        name: metadata.number(f"rope.scaling.yarn_{key}")
        for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"))
        if metadata.get(f"rope.scaling.yarn_{key}") is not None
    }
    return options | {
        "rope_type": "yarn",
        "factor": metadata.number("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.number("rope.scaling.original_context_length"),
    }


def _llama3_rope(metadata: _Metadata) -> dict[str, Any]:
    """Llama 3.1's and 3.2's scaling. The file has only its result, a factor for each frequency.

    Raises:
      UserError: the factors are another scaling's.
    """
    found = np.array(metadata.factors(_LLAMA3_FACTORS))
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    frequencies = float(metadata.number("rope.freq_base", 10_000.0)) ** -(np.arange(len(found)) / len(found))
    smooth = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    if not np.allclose(1 / found, (1 - smooth) / factor + smooth, rtol=1e-4):
        raise UserError(f"{metadata.file.path}:{_LLAMA3_FACTORS}: has other factors than Llama 3's; use another model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _llama(metadata: _Metadata) -> dict[str, Any]:
    """Llama and models of its shape. Mistral's window is not in the files, and llama.cpp has none either."""
    names = metadata.file.tensors
    return _decoder(metadata, "llama", "LlamaForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def _granite(metadata: _Metadata) -> dict[str, Any]:
    return _llama(metadata) | {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": metadata.number("attention.scale"),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }


def _ministral3(metadata: _Metadata) -> dict[str, Any]:
    """Its rope is YaRN with two scales of attention, of which the file has one; the other is 1 in all models."""
    values = _decoder(metadata, "ministral3", "Ministral3ForCausalLM")
    return values | {
        "rope_scaling": None,
        "rope_parameters": (values["rope_scaling"] or {"rope_type": "default"})
        | {
            "rope_theta": values["rope_theta"],
            "mscale": 1.0,
            "mscale_all_dim": metadata.number("rope.scaling.yarn_log_multiplier"),
            "llama_4_scaling_beta": metadata.number("attention.temperature_scale"),
        },
    }


def _olmo(metadata: _Metadata) -> dict[str, Any]:
    """OLMo 3 has windows, OLMo 2 has none. Rope is scaled only in layers without a window."""
    is_olmo3 = metadata.get("attention.sliding_window") is not None
    values = _decoder(metadata, *(("olmo3", "Olmo3ForCausalLM") if is_olmo3 else ("olmo2", "Olmo2ForCausalLM")))
    values["attention_bias"] = "blk.0.attn_q.bias" in metadata.file.tensors
    if not is_olmo3:
        return values
    theta, has_window = values["rope_theta"], metadata.get("attention.sliding_window_pattern")
    return values | {
        "sliding_window": metadata.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in has_window],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta} | (values["rope_scaling"] or {}),
            "sliding_attention": {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", theta)},
        },
    }


def _smollm3(metadata: _Metadata) -> dict[str, Any]:
    return _decoder(metadata, "smollm3", "SmolLM3ForCausalLM")


def _qwen2(metadata: _Metadata) -> dict[str, Any]:
    return _decoder(metadata, "qwen2", "Qwen2ForCausalLM")


def _qwen3(metadata: _Metadata) -> dict[str, Any]:
    return _decoder(metadata, "qwen3", "Qwen3ForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors
    }


def _qwen3_moe(metadata: _Metadata) -> dict[str, Any]:
    return _decoder(metadata, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors,
        "moe_intermediate_size": metadata.number("expert_feed_forward_length"),
        "num_experts": metadata.number("expert_count"),
        "num_experts_per_tok": metadata.number("expert_used_count"),
        "norm_topk_prob": True,
    }


def _gemma2(metadata: _Metadata) -> dict[str, Any]:
    return _gemma(metadata, "gemma2", "Gemma2ForCausalLM", layers_of_27b=46) | {
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping"),
    }


def _gemma3(metadata: _Metadata) -> dict[str, Any]:
    return _gemma(metadata, "gemma3_text", "Gemma3ForCausalLM", layers_of_27b=62) | {
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
        "sliding_window_pattern": metadata.number("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
    }


def _gemma(metadata: _Metadata, model_type: str, architecture: str, layers_of_27b: int) -> dict[str, Any]:
    """As in llama.cpp, which model it is says how attention is scaled: the files do not."""
    values = _decoder(metadata, model_type, architecture)
    is_27b = values["num_hidden_layers"] == layers_of_27b
    scale = values["hidden_size"] // values["num_attention_heads"] if is_27b else values["head_dim"]
    return values | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": metadata.number("attention.sliding_window"),
    }


def _phi3(metadata: _Metadata) -> dict[str, Any]:
    values = _decoder(metadata, "phi3", "Phi3ForCausalLM")
    width = values["hidden_size"] // values["num_attention_heads"]
    context, number = values["max_position_embeddings"], metadata.number
    metadata.get("rope.scaling.attn_factor")  # Transformers computes it from the two lengths, as the converter did.
    return values | {
        "head_dim": width,
        "original_max_position_embeddings": number("rope.scaling.original_context_length", context),
        "partial_rotary_factor": number("rope.dimension_count", width) / width,
        # 0 says that there is none.
        "sliding_window": number("attention.sliding_window", 0) or None,
        "rope_scaling": _longrope(metadata) if _LONG_FACTORS in metadata.file.tensors else None,
    }


def _longrope(metadata: _Metadata) -> dict[str, Any]:
    return {
        "type": "longrope",
        "short_factor": metadata.factors(_SHORT_FACTORS),
        "long_factor": metadata.factors(_LONG_FACTORS),
    }


def _gpt2(metadata: _Metadata) -> dict[str, Any]:
    number = metadata.number
    return _model(metadata, "gpt2", "GPT2LMHeadModel") | {
        "n_embd": number("embedding_length"),
        "n_layer": number("block_count"),
        "n_head": number("attention.head_count"),
        "n_inner": number("feed_forward_length"),
        "n_positions": number("context_length"),
        "layer_norm_epsilon": number("attention.layer_norm_epsilon"),
        # Files of older converters have the table a second time, as a head.
        "tie_word_embeddings": True,
    }


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How llama.cpp writes an architecture.

    Attributes:
      config: the values of the Hugging Face model's config.json.
      prefix: of the names of the Hugging Face model's tensors.
      rotary_neighbors: whether the two rows of a query or key that rotate together are next to each other. Hugging
        Face has half a head between them.
      norm_offset: what the converter adds to the scales of norms.
      transposed: Hugging Face's names of layers whose kernels it has as [in, out]; llama.cpp always has [out, in].
    """

    config: Callable[[_Metadata], dict[str, Any]]
    prefix: str = "model."
    rotary_neighbors: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()


# By llama.cpp's names.
_ARCHITECTURES = {
    "gemma2": _Architecture(_gemma2, norm_offset=1.0),
    "gemma3": _Architecture(_gemma3, norm_offset=1.0),
    "gpt2": _Architecture(_gpt2, "transformer.", transposed=("c_attn", "c_proj", "c_fc")),
    "granite": _Architecture(_granite, rotary_neighbors=True),
    "llama": _Architecture(_llama, rotary_neighbors=True),
    "mistral3": _Architecture(_ministral3, rotary_neighbors=True),
    "olmo2": _Architecture(_olmo),
    "phi3": _Architecture(_phi3),
    "qwen2": _Architecture(_qwen2),
    "qwen3": _Architecture(_qwen3),
    "qwen3moe": _Architecture(_qwen3_moe),
    "smollm3": _Architecture(_smollm3, rotary_neighbors=True),
}


def config_values(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in a file.

    Raises:
      UserError: the architecture, or something about it, is not supported.
    """
    if file.architecture not in _ARCHITECTURES:
        raise UserError(
            f"{file.path}:general.architecture: {file.architecture!r} is not supported; use a model of one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    metadata = _Metadata(file)
    values = _ARCHITECTURES[file.architecture].config(metadata)
    metadata.require_all_read()
    return values


class GgufTensor:
    """A Hugging Face model's tensor in a GGUF file.

    Attributes:
      file: the GGUF file.
      dtype: see `GgufFile.dtype`.
      shape: of the Hugging Face model's tensor.
    """

    def __init__(
        self,
        stored: StoredTensor,
        dtype: str,
        *,
        expert: int | None = None,
        heads: int = 0,
        offset: float = 0.0,
        transposed: bool = False,
    ):
        """
        Args:
          expert: its place in a tensor of all experts.
          heads: if above 0, rows are in the order of `_Architecture.rotary_neighbors`, head by head.
          offset: what was added to it.
        """
        self.file, self.dtype = stored.file, dtype
        self._stored, self._expert, self._heads, self._offset = stored, expert, heads, offset
        self._transposed = transposed
        shape = stored.shape if expert is None else stored.shape[1:]
        self.shape = shape[::-1] if transposed else shape

    def read_rows(self, rows: Sequence[int]) -> Shaped[np.ndarray, "R D"]:
        return self.read((np.asarray(rows),))

    def read(self, index: tuple[slice | Int[np.ndarray, " R"], ...] = ()) -> Shaped[np.ndarray, "*S"]:
        """As `Checkpoint.read`. The first axis also takes rows by their numbers."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        if len(self.shape) == 1:
            values = self._stored.read(slice(None))[0][self._order()][index]
        else:
            rows, columns = reversed(index) if self._transposed else index
            values = self._stored.read(self._order()[rows])[:, columns]
        if self._offset:
            values = (values.astype(np.float32) - np.float32(self._offset)).astype(values.dtype)
        return values.T if self._transposed else values

    def _order(self) -> Int[np.ndarray, " R"]:
        """The place in the file of each row, or of each number of a vector."""
        count = self.shape[-1 if self._transposed else 0]
        if not self._heads:
            return np.arange(count) + count * (self._expert or 0)
        return np.arange(count).reshape(self._heads, -1, 2).swapaxes(1, 2).reshape(-1)


def tensors(file: GgufFile, config: PretrainedConfig) -> dict[str, GgufTensor]:
    """The tensors of the model in a file, by their names in a Hugging Face checkpoint.

    Args:
      config: of `config_values`.

    Raises:
      UserError: the file has a tensor that such a model does not have.
    """
    architecture = _ARCHITECTURES[file.architecture]
    found, used = {}, {_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS}
    for name, stored_name, expert in _names(file.architecture, config):
        if stored_name in file.tensors:
            used.add(stored_name)
            found[name] = _tensor(file, architecture, config, name, stored_name, expert)
    if others := sorted(file.tensors.keys() - used):
        raise UserError(
            f"{file.path}:{others[0]}: a {config.model_type} model here has no such tensor; use another model"
        )
    return found


def _names(architecture: str, config: PretrainedConfig) -> Iterator[tuple[str, str, int | None]]:
    """Each tensor's names in a Hugging Face checkpoint and in the file, and the place of its expert."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known, prefix = gguf.get_tensor_name_map(kind, 1), _ARCHITECTURES[architecture].prefix
    shape = families.transformer_config(config, max_length=1)
    templates = {f"{prefix}{source.name}" for source in families.sources(config).values()}
    for template in sorted(templates | {f"{prefix}{families.EMBEDDING[config.model_type]}", _HEAD}):
        first, _, suffix = template.format(layer=0, expert=0).replace(".experts.0.", ".experts.").rpartition(".")
        if not (stored := known.get_name(first)):
            continue
        for layer in range(shape.layers if "{layer}" in template else 1):
            for expert in range(shape.experts if "{expert}" in template else 1):
                yield (
                    template.format(layer=layer, expert=expert),
                    f"{stored}.{suffix}".replace("blk.0.", f"blk.{layer}."),
                    expert if "{expert}" in template else None,
                )


def _tensor(
    file: GgufFile,
    architecture: _Architecture,
    config: PretrainedConfig,
    name: str,
    stored_name: str,
    expert: int | None,
) -> GgufTensor:
    layer, _, parameter = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    return GgufTensor(
        file.tensors[stored_name],
        file.dtype,
        expert=expert,
        heads=heads.get(layer, 0) if architecture.rotary_neighbors else 0,
        offset=architecture.norm_offset if "norm" in layer else 0.0,
        transposed=parameter == "weight" and layer in architecture.transposed,
    )
