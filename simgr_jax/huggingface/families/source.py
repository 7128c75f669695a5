"""Where each of our parameters is stored in a checkpoint, and the building blocks of every family's mapping."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError
from simgr_jax.models.transformer_config import LayerFields

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters is stored in a checkpoint, for one layer (and one expert) at a time.

    The export reverses the mapping. All parameters with the same `name` make up one tensor: each layer's (and expert's)
    array has its last two axes swapped if `transpose`, and is then written to its `part`. The parts cover the tensor
    without overlap.

    Attributes:
      name: the tensor's name without the checkpoint's prefix (see `families.prefix`). It contains "{layer}" if our
        parameter is stacked over layers, and "{expert}" if ours is stacked over experts and the checkpoint has one
        tensor per expert.
      transpose: whether to swap the last two axes: torch's Linear is [out, in], ours is [in, out].
      part: (axis, start, stop) of our part of the tensor, in the checkpoint's axis order; None means all of it.
      layers: the numbers of the layers that our parameter is stacked over, if `name` contains "{layer}".
    """

    name: str
    transpose: bool = False
    part: tuple[int, int, int] | None = None
    layers: tuple[int, ...] = ()


def linear(ours: str, theirs: str, bias: bool = False) -> dict[str, Source]:
    """The sources of a projection stored as a torch Linear."""
    table = {f"{ours}.kernel": Source(f"{theirs}.weight", transpose=True)}
    return table | {f"{ours}.bias": Source(f"{theirs}.bias")} if bias else table


def unsupported(option: str) -> UserError:
    return UserError(f"config.backbone.checkpoint: {option} in its config is not supported; use another model")


def require_off(config: PretrainedConfig, *options: str) -> None:
    """
    Raises:
      UserError: one of these unsupported options is set.
    """
    for option in options:
        if value := getattr(config, option, None):
            raise unsupported(f"{option} = {value}")


def head_width(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def activation(name: str) -> str:
    """Our name for one of Transformers' activations.

    Raises:
      UserError: the activation is not supported.
    """
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in names:
        raise unsupported(f'the activation "{name}"')
    return names[name]


def layer_windows(config: PretrainedConfig, *others: str) -> tuple[int, ...]:
    """Each layer's attention window, 0 for full attention, for families whose configs list `layer_types`.

    Args:
      others: types of layers without attention, whose window is 0.

    Raises:
      UserError: a layer's type is not supported.
    """
    windows = {"full_attention": 0, "sliding_attention": getattr(config, "sliding_window", None) or 0}
    windows |= dict.fromkeys(others, 0)
    if unknown := set(config.layer_types) - set(windows):
        raise unsupported(f'the layer type "{min(unknown)}"')
    return tuple(windows[kind] for kind in config.layer_types)


def layer_fields(config: PretrainedConfig, fields: dict[str, dict[str, Any]]) -> LayerFields:
    """`TransformerConfig.layer_fields`.

    Args:
      fields: what differs, by layer type.
    """
    return tuple(tuple(sorted(fields.get(kind, {}).items())) for kind in config.layer_types)
