"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): small trained matrices beside frozen weights."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.devices.sharding import axes_of
from simgr_jax.errors import UserError
from simgr_jax.models.linear import Linear
from simgr_jax.models.transformer import Transformer


class Frozen(nnx.Variable):
    """A parameter that isn't trained. It has no gradient or optimizer state, and a run's checkpoints leave it out."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which projections get adapters, and of what kind.

    Attributes:
      rank: r, the adapters' inner width.
      alpha: the adapters' output is multiplied by alpha / r.
      targets: names of the projections that get an adapter.
      dropout: rate on the adapters' input.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.lora.dropout: {self.dropout} is not a rate; give a number in [0, 1)")
        if not self.targets:
            raise UserError("config.lora.targets: is empty, so nothing would be adapted; name projections like q_proj")


class LoRA(nnx.Module):
    """alpha / r * dropout(x) A B. B starts at zero, so an adapted backbone starts out equal to the original.

    A and B have the kernel's leading axis for the layers, if it has one.
    """

    def __init__(self, kernel_shape: tuple[int, ...], config: LoRAConfig, dtype: str, rngs: nnx.Rngs):
        *layers, in_width, out_width = kernel_shape
        self.a = nnx.Param(_he_uniform(rngs.params(), (*layers, in_width, config.rank)), axes=("embed", None))
        self.b = nnx.Param(jnp.zeros((*layers, config.rank, out_width), jnp.float32), axes=(None, "embed"))
        self.scale, self.dtype = config.alpha / config.rank, dtype
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "*B in"], rngs: nnx.Rngs | None) -> Float[Array, "*B out"]:
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.scale * (x @ self.a[...].astype(self.dtype)) @ self.b[...].astype(self.dtype)

    def product(self) -> Float[Array, "*L in out"]:
        """The float32 matrix that `merge` adds to the kernel."""
        return self.scale * (self.a[...] @ self.b[...])


def _he_uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "*L in r"]:
    """`nnx.initializers.he_uniform`, to the bit, but drawn flat: XLA takes seconds to compile a draw of three axes."""
    draw = jax.random.uniform(key, (math.prod(shape),), jnp.float32, -1)
    return (draw * jnp.sqrt(jnp.float32(6 / shape[-2]))).reshape(shape)


def freeze(module: nnx.Module) -> None:
    """Makes every parameter of `module` Frozen, in place."""
    for node in [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]:
        for name, value in list(vars(node).items()):
            if isinstance(value, nnx.Param):
                setattr(node, name, Frozen(value[...], axes=axes_of(value)))


def add(backbone: Transformer, config: LoRAConfig, rngs: nnx.Rngs, name: str = "the backbone") -> None:
    """Freezes `backbone` and gives each projection in `config.targets` an adapter, in place.

    Args:
      name: what an error calls it.

    Raises:
      UserError: the backbone lacks a target.
    """
    freeze(backbone)
    linears: dict[str, list[Linear]] = {}
    for path, node in nnx.iter_graph(backbone):
        if isinstance(node, Linear):
            linears.setdefault(path[-1], []).append(node)
    for target in config.targets:
        if target not in linears:
            raise UserError(
                f"config.lora.targets: {name} has no projection {target}; choose among {', '.join(sorted(linears))}"
            )
        for linear in linears[target]:
            linear.lora = LoRA(linear.kernel.shape, config, linear.dtype, rngs)


def merge(backbone: Transformer) -> None:
    """Folds every adapter into its kernel, in place."""
    adapted = [node for _, node in nnx.iter_graph(backbone) if isinstance(node, Linear) and node.lora is not None]
    for node in adapted:
        kernel = node.kernel[...]
        node.kernel[...] = (kernel.astype(jnp.float32) + node.lora.product()).astype(kernel.dtype)
        node.lora = None
