"""Readout: turns the backbone's state after a history into the user's vector, which is compared with the items'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

# "state" is the state itself, as in the paper.
READOUTS = ("auto", "state", "last_item")
# "auto" is "state" for backbones of up to this many layers that are trained from scratch, and "last_item" for others.
MOST_LAYERS_FOR_STATE = 4


def choose(name: str, has_checkpoint: bool, layers: int) -> str:
    """The readout that `name` stands for, "state" or "last_item"."""
    if name != "auto":
        return name
    return "last_item" if has_checkpoint or layers > MOST_LAYERS_FOR_STATE else "state"


class LastItem(nnx.Module):
    """The vector of the item that was read last, plus a linear map of the standardized state. The map begins at zero.

    The states of a pretrained or a deep backbone have a common mean and a few dimensions with most of their energy, so
    they all point one way, and a similarity with them can only tell which items are popular. Standardizing each
    dimension lets the map see all of them. The model begins as "similar to what was read last", and the backbone learns
    the difference.

    Attributes:
      mean, deviation: float32 [D], of the states of some training batches before the first step (`standardize_by`);
        they are not trained.
      map: [D, D], from the standardized state to the user's vector.
    """

    def __init__(self, width: int):
        self.mean = nnx.Param(jnp.zeros(width))
        self.deviation = nnx.Param(jnp.ones(width))
        self.map = nnx.Param(jnp.zeros((width, width)))

    def __call__(self, states: Float[Array, "*B D"], last_vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        mean, deviation = map(jax.lax.stop_gradient, (self.mean[...], self.deviation[...]))
        standardized = (states.astype(jnp.float32) - mean) / deviation
        # By the root of the width, so that a step of the optimizer changes the vector as little as in narrow models.
        return last_vectors + standardized @ self.map[...] / np.sqrt(states.shape[-1])

    def standardize_by(self, mean: Float[np.ndarray, " D"], deviation: Float[np.ndarray, " D"]) -> None:
        """A dimension that never changes keeps a deviation of 1."""
        for parameter, values in ((self.mean, mean), (self.deviation, np.where(deviation > 1e-6, deviation, 1))):
            parameter[...] = jax.device_put(np.asarray(values, np.float32), parameter[...].sharding)

    def folded(self) -> tuple[Float[np.ndarray, "D D"], Float[np.ndarray, " D"]]:
        """(kernel, bias) such that the user's vector is the last item's plus state @ kernel + bias; float32."""
        mean, deviation, kernel = (np.asarray(part[...], np.float64) for part in (self.mean, self.deviation, self.map))
        kernel = kernel / deviation[:, None] / np.sqrt(len(kernel))
        return kernel.astype(np.float32), (-mean @ kernel).astype(np.float32)
