"""What a layer computes for each position on its own: an MLP, or a mixture of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.linear import Linear
from simgr_jax.models.transformer_config import TransformerConfig

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        widths, bias, dtype = (config.width, config.mlp_width), config.mlp_bias, config.dtype
        self.gate_proj = Linear(*widths, bias, dtype, rngs, ("embed", "mlp")) if config.gated_mlp else None
        self.up_proj = Linear(*widths, bias, dtype, rngs, ("embed", "mlp"))
        self.down_proj = Linear(*widths[::-1], bias, dtype, rngs, ("mlp", "embed"))

    def __call__(self, x, rngs):
        activation = ACTIVATIONS[self.activation]
        up = self.up_proj(x, rngs)
        inner = activation(up) if self.gate_proj is None else activation(self.gate_proj(x, rngs)) * up
        return self.down_proj(sharding.constrain(inner, "batch", None, "mlp"), rngs)


class ExpertLinear(nnx.Module):
    """One projection of every expert; row i of the input goes through the expert of its group."""

    def __init__(self, in_width: int, out_width: int, config: TransformerConfig, rngs: nnx.Rngs, axes: tuple[str, str]):
        init = nnx.initializers.normal(0.02)
        self.dtype = config.dtype
        self.kernel = nnx.Param(init(rngs.params(), (config.experts, in_width, out_width), jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "M in"], group_sizes: Int[Array, " experts"]) -> Float[Array, "M out"]:
        return jax.lax.ragged_dot(x, self.kernel[...].astype(self.dtype), group_sizes)


class MixtureOfExperts(nnx.Module):
    """Each position goes through the `experts_per_token` experts that the router finds most probable; no position is
    dropped (Qwen3-MoE, https://arxiv.org/abs/2505.09388)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Linear(config.width, config.experts, False, config.dtype, rngs)
        self.gate_proj = ExpertLinear(config.width, config.mlp_width, config, rngs, ("embed", "mlp"))
        self.up_proj = ExpertLinear(config.width, config.mlp_width, config, rngs, ("embed", "mlp"))
        self.down_proj = ExpertLinear(config.mlp_width, config.width, config, rngs, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None) -> Float[Array, "B T D"]:
        probabilities = jax.nn.softmax(self.router(x, rngs).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.experts_per_token)
        if self.config.normalize_expert_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        # Each device sorts its own rows by expert.
        experts = {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}
        graphdef, parameters = nnx.split(experts)
        mix = sharding.per_device(
            lambda parameters, *arrays: self._mix(nnx.merge(graphdef, parameters), *arrays),
            (sharding.gathered_specs(parameters), *(sharding.spec("batch", None, None),) * 3),
            sharding.spec("batch", None, None),
        )
        return mix(parameters, x, weights, chosen)

    def _mix(
        self,
        experts: dict[str, ExpertLinear],
        x: Float[Array, "B T D"],
        weights: Float[Array, "B T C"],
        chosen: Int[Array, "B T C"],
    ) -> Float[Array, "B T D"]:
        rows, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        # Sorted by expert, each expert's rows are one block of a ragged matrix product.
        order = jnp.argsort(chosen)
        group_sizes = jnp.bincount(chosen, length=self.config.experts).astype(jnp.int32)
        owners = order // self.config.experts_per_token
        gate = ACTIVATIONS[self.config.activation](experts["gate_proj"](rows[owners], group_sizes))
        outputs = experts["down_proj"](gate * experts["up_proj"](rows[owners], group_sizes), group_sizes)
        outputs = outputs * weights.reshape(-1)[order, None].astype(outputs.dtype)
        # If the experts' inner width is split over devices, each device has a part of the sum.
        return sharding.psum(jnp.zeros_like(rows).at[owners].add(outputs), "mlp").reshape(x.shape)
