"""The gated short convolution of LFM2 (https://arxiv.org/abs/2511.23404), which takes attention's place in a layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.models.linear import Linear
from simgr_jax.models.reading import Layer, Reading
from simgr_jax.models.transformer_config import TransformerConfig


def convolution_kernel(channels: int, config: TransformerConfig, rngs: nnx.Rngs, axis: str) -> nnx.Param:
    """[channels, 1, K], torch's layout of a convolution of each channel on its own."""
    kernel = nnx.initializers.normal(0.02)(rngs.params(), (channels, 1, config.convolution_width), jnp.float32)
    return nnx.Param(kernel, axes=(axis, None, None))


class ShortConvolution(nnx.Module):
    """out_gate * convolution(in_gate * x), where both gates and x are projections of the input."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width, bias = config.width, config.convolution_bias
        inner = lambda: Linear(width, width, bias, config.dtype, rngs, ("embed", "mlp"))  # noqa: E731
        self.in_gate_proj, self.out_gate_proj, self.x_proj = inner(), inner(), inner()
        self.kernel = convolution_kernel(width, config, rngs, "mlp")
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if bias else None
        self.o_proj = Linear(width, width, bias, config.dtype, rngs, ("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "B T D"], layer: Layer, reading: Reading, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B Q D"], Any]:
        inner = self.in_gate_proj(x, rngs) * self.x_proj(x, rngs)
        mixed, kept = reading.convolve(inner, self.kernel[...][:, 0], layer.cached)
        if self.bias is not None:
            mixed = mixed + self.bias[...].astype(mixed.dtype)
        return self.o_proj(self.out_gate_proj(reading.asked(x), rngs) * reading.asked(mixed), rngs), kept
