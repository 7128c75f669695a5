"""An exported model's config.json, which Transformers 4.57 and 5 read alike.

Transformers 5 writes rotary positions as `rope_parameters`. 4.57 reads `rope_theta`, `rope_scaling` and a few keys
beside them, and where these are missing it takes its defaults in silence. 5 reads them, too, so exports have both;
those of models that 4.57 does not know have only the former.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.families import rope
from simgr_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The architecture of a multimodal model's language model.
_TEXT_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
# The oldest version of Transformers that knows a model type, where it is not 4.57.
_SINCE = {"gemma4_text": "5.5", "ministral3": "5.0", "qwen3_5_text": "5.2"}


def finetuned(
    checkpoint: Checkpoint, backbone: Transformer, rows: int, has_head: bool, dtype: str | None
) -> dict[str, Any]:
    """The checkpoint's config.json with few changes, so that whatever else reads it can read ours.

    Args:
      rows: of the token embedding.
      has_head: whether the language-model head is a tensor of its own.
      dtype: the weights', or None for the checkpoint's.
    """
    original, config = copy.deepcopy(checkpoint.config_values), families.text_config(checkpoint.config)
    values = original
    if is_multimodal(checkpoint):
        kind = config.model_type
        text = original.get("text_config") or {}
        values = text | {"model_type": kind, "architectures": [_TEXT_ARCHITECTURES[kind]]}
    # A head that is neither tied nor in the file would be drawn at random.
    values |= {"vocab_size": rows, "tie_word_embeddings": not has_head}
    values.pop("tie_embedding", None)  # An older name in LFM2's configs, which would win.
    if backbone.config.per_layer_width:
        values["vocab_size_per_layer_input"] = rows
    dtype_key = "torch_dtype" if "torch_dtype" in original else "dtype"
    if dtype := dtype or original.get(dtype_key):
        values[dtype_key] = dtype
    uses_long_form = backbone.config.rope != families.transformer_config(checkpoint.config, max_length=1).rope
    return in_both_spellings(values, config, uses_long_form)


def is_multimodal(checkpoint: Checkpoint) -> bool:
    return families.text_config(checkpoint.config) is not checkpoint.config


def in_both_spellings(values: dict[str, Any], config: PretrainedConfig, uses_long_form: bool = False) -> dict[str, Any]:
    """`values` with what 4.57 and 5 name differently, in the names of both.

    Args:
      values: the content of a config.json.
      config: what Transformers makes of it.
      uses_long_form: whether training used the long form of Phi-3's longrope; for short prompts, Transformers would use
        the short form.
    """
    if config.model_type in _SINCE:
        return values
    values = {key: value for key, value in values.items() if key != "rope_scaling"}
    if config.model_type == "qwen3_moe":
        values |= dict.fromkeys(("num_experts", "num_local_experts"), config.num_experts)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return values
    if "rope_type" in parameters:
        parameters = _known_to_both(config, parameters, uses_long_form)
        return values | {"rope_parameters": parameters} | _older_rope(config, parameters)
    parameters = {kind: _known_to_both(config, entry, uses_long_form) for kind, entry in parameters.items()}
    values["rope_parameters"] = parameters
    if config.model_type != "gemma3_text":  # 4.57 knows no other model of ours whose layers differ in their positions.
        return values
    local = parameters["sliding_attention"]
    # 4.57 can't scale the positions of these layers; null is an error there.
    base = local["rope_theta"] if local["rope_type"] == "default" else None
    return values | _older_rope(config, parameters["full_attention"]) | {"rope_local_base_freq": base}


def _known_to_both(config: PretrainedConfig, parameters: dict[str, Any], uses_long_form: bool) -> dict[str, Any]:
    """An entry of `rope_parameters`. 4.57 does not know "proportional", which is written as the same longrope."""
    kind = parameters["rope_type"]
    if kind == "longrope" and uses_long_form:
        return parameters | {"short_factor": parameters["long_factor"]}
    if kind != "proportional":
        return parameters
    frequencies = rope.rope(config, parameters, max_length=1).frequencies
    factors = [parameters.get("factor", 1.0) if frequency else _STOPS for frequency in frequencies]
    return {
        "rope_type": "longrope",
        "rope_theta": parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


# A pair of dimensions whose frequency is divided by this does not turn as far as float32 can tell.
_STOPS = 1e30


def _older_rope(config: PretrainedConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """One entry of `rope_parameters` in the keys that 4.57 reads."""
    kind, values = parameters["rope_type"], {"rope_theta": parameters["rope_theta"]}
    if (share := parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        values["partial_rotary_factor"] = share
    if kind == "default":
        return values
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        values["original_max_position_embeddings"] = original
        scaling = {key: parameters[key] for key in ("short_factor", "long_factor")}
        # 4.57 derives the scale from other keys than 5.
        scale = rope.rope(config, parameters, max_length=1).scale
        if config.model_type == "phi3":
            # 4.57 wants these three keys; it refuses a fourth, which says that it can't derive this scale.
            derived = {"attention_factor": None, "factor": config.max_position_embeddings / original}
            own_scale = {} if scale == rope.rope(config, parameters | derived, 1).scale else {"attention_factor": scale}
            return values | {"rope_scaling": scaling | {"type": kind} | own_scale}
        scaling |= {
            "original_max_position_embeddings": original,
            "attention_factor": scale,
            "factor": parameters.get("factor") or config.max_position_embeddings / original,
        }
    else:
        left_out = ("rope_type", "rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in left_out and value is not None}
    return values | {"rope_scaling": scaling | {"rope_type": kind}}


class Loading(NamedTuple):
    """How Transformers loads the decoder: `CLASS.from_pretrained(FOLDER OPTIONS)ATTRIBUTE`.

    Attributes:
      auto_class: Transformers' name of the class.
      options: further arguments, with a comma before each.
      attribute: where the decoder is in it.
      since: the oldest version of Transformers that loads it.
    """

    auto_class: str = "AutoModel"
    options: str = ""
    attribute: str = ""
    since: str = "4.57"

    def code(self, folder: str, options: str = "") -> str:
        """An expression for the decoder in the folder that the expression `folder` gives."""
        return f"{self.auto_class}.from_pretrained({folder}{options}{self.options}){self.attribute}"


def loading(config: PretrainedConfig) -> Loading:
    """
    Args:
      config: of the decoder.
    """
    result = Loading(since=_SINCE.get(config.model_type, "4.57"))
    if getattr(config, "attn_logit_softcapping", None) or not getattr(config, "scale_attn_weights", True):
        # 4.57's default attention, and that of early versions of 5, leaves these out.
        result = result._replace(options=', attn_implementation="eager"')
    if config.model_type == "gemma3_text":
        # 4.57's AutoModel does not find the weights of a Gemma 3 with a head, and draws them at random.
        result = result._replace(auto_class="AutoModelForCausalLM", attribute=".model")
    return result
