"""The projection that every model is built of."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """x W + b, computed in `dtype`, plus the output of a low-rank adapter if `lora.add` has attached one.

    Args:
      axes: the kernel's logical axes (see `devices.sharding.RULES`).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] | tuple[()] = (),
    ):
        self.dtype = dtype
        kernel = nnx.initializers.normal(0.02)(rngs.params(), (in_width, out_width), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(out_width, jnp.float32)) if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "*B in"], rngs: nnx.Rngs | None) -> Float[Array, "*B out"]:
        # As one matrix: with more axes, XLA would copy the transposed operands of the kernel's gradient on a CPU.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        y = y if self.lora is None else y + self.lora(rows, rngs)
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), "projection")
