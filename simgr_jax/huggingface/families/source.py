"""Where a parameter of ours lives in a checkpoint, and what every family's mapping is put together from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from simgr_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters lives in a checkpoint, one layer (and one expert) at a time.

    An exporter goes the same way back: the parameters whose sources have one `name` make up that tensor. Each layer's
    (and expert's) array has its last two axes swapped if `transpose`; a `part` is then written to [start, stop) of its
    axis. The parts of a tensor cover it, and none overlaps another.

    Attributes:
      name: of the tensor, after the checkpoint's prefix (see `prefix`), with "{layer}" where ours is stacked over
        layers, and "{expert}" where the checkpoint has a tensor for each expert and ours is stacked over them, too.
      transpose: whether its last two axes are to be swapped: torch's Linear is [out, in] and ours [in, out].
      part: (axis, start, stop) of the tensor, as it lies in the checkpoint, that ours is; None is all of it.
    """

    name: str
    transpose: bool = False
    part: tuple[int, int, int] | None = None


def linear(ours: str, theirs: str, bias: bool = False) -> dict[str, Source]:
    """The sources of a projection that is a torch Linear in the checkpoint."""
    table = {f"{ours}.kernel": Source(f"{theirs}.weight", transpose=True)}
    return table | {f"{ours}.bias": Source(f"{theirs}.bias")} if bias else table


def unsupported(option: str) -> UserError:
    return UserError(f"config.backbone.checkpoint: {option} in its config.json is not supported; use another model")


def require_off(config: PretrainedConfig, *options: str) -> None:
    """
    Raises:
      UserError: one of the options, none of which is computed here, is set.
    """
    for option in options:
        if value := getattr(config, option, None):
            raise unsupported(f"{option} = {value}")


def head_width(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def activation(name: str) -> str:
    """Our name of one of Transformers' activations.

    Raises:
      UserError: it is not computed here.
    """
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in names:
        raise unsupported(f'the activation "{name}"')
    return names[name]


def layer_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """The attention window of each layer, 0 for all, of families whose configs tell each layer's type.

    Raises:
      UserError: a layer's attention is of a kind that is not computed here.
    """
    windows = {"full_attention": 0, "sliding_attention": config.sliding_window or 0}
    if others := set(config.layer_types) - set(windows):
        raise unsupported(f'the layer type "{min(others)}"')
    return tuple(windows[kind] for kind in config.layer_types)
