"""RQ-VAE: an autoencoder with a residual-quantized latent."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.semantic_ids.kmeans import kmeans

# A code that no item chose in this many steps is dead.
REVIVAL_INTERVAL = 50


@dataclasses.dataclass(frozen=True)
class Options:
    """The architecture and training of an RQ-VAE.

    Attributes:
      steps: the number of Adam steps.
      learning_rate: the peak, after a warm-up over the first 5% of the steps. It then falls to 0 by cosine.
      hidden_widths: widths of the encoder's hidden layers; the decoder mirrors them.
      latent_dim: width of the quantized latent.
      commitment: beta, the weight of the loss that pulls latents towards their codes.
      batch_size: items per step.
    """

    steps: int = 1500
    learning_rate: float = 2e-3
    hidden_widths: Sequence[int] = (512, 256)
    latent_dim: int = 64
    commitment: float = 0.25
    batch_size: int = 1024


class MLP(nnx.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths)])

    def __call__(self, x: Float[Array, "B in"]) -> Float[Array, "B out"]:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class RQVAE(nnx.Module):
    """Residual-quantized autoencoder (Lee et al. 2022, arXiv 2203.01941; semantic IDs: TIGER, arXiv 2305.05065)."""

    def __init__(self, dim: int, levels: int, codebook_size: int, options: Options, *, rngs: nnx.Rngs):
        widths = [dim, *options.hidden_widths, options.latent_dim]
        self.encoder = MLP(widths, rngs=rngs)
        self.decoder = MLP(widths[::-1], rngs=rngs)
        self.codebooks = nnx.Param(jnp.zeros((levels, codebook_size, options.latent_dim)))

    def quantize(
        self, latent: Float[Array, "B D"]
    ) -> tuple[Int[Array, "B L"], Float[Array, "L B D"], Float[Array, "L B D"]]:
        """Returns the codes, the residual that each level quantizes, and the code vector it chooses."""
        codes, residuals, chosen = [], [], []
        for codebook in self.codebooks[...]:
            codes.append(_nearest(latent, codebook))
            residuals.append(latent)
            chosen.append(codebook[codes[-1]])
            latent = latent - jax.lax.stop_gradient(chosen[-1])
        return jnp.stack(codes, axis=1), jnp.stack(residuals), jnp.stack(chosen)

    def loss(self, x: Float[Array, "B D"], commitment: float) -> tuple[Float[Array, ""], tuple[Array, Array]]:
        """Returns the loss and (codes, residuals).

        The loss is the reconstruction error plus |sg(residual) - code|^2 + beta |residual - sg(code)|^2 per level.
        """
        latent = self.encoder(x)
        codes, residuals, chosen = self.quantize(latent)
        quantized = latent + jax.lax.stop_gradient(chosen.sum(axis=0) - latent)  # straight-through
        reconstruction = _squared_error(x, self.decoder(quantized))
        codebook = _squared_error(jax.lax.stop_gradient(residuals), chosen)
        commit = _squared_error(residuals, jax.lax.stop_gradient(chosen))
        return reconstruction + codebook + commitment * commit, (codes, residuals)


def fit(
    embeddings: np.ndarray, levels: int, codebook_size: int, seed: int, options: Options | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Trains an RQ-VAE on the catalog and encodes it.

    Codebooks start as a residual k-means of the untrained encoder's latents. Every `REVIVAL_INTERVAL` steps, codes that
    no item chose move onto residuals of the batch, so no code stays dead.

    Args:
      embeddings: float32 [N, D].
      levels: L.
      codebook_size: K <= N.
      seed: of the initial weights, the k-means and the batches.
      options: None for the defaults.

    Returns:
      codes int32 [N, L] and the reconstruction float32 [N, D].
    """
    options = options or Options()
    mean = embeddings.mean(axis=0)
    scale = max(float((embeddings - mean).std()), 1e-12)
    data = jnp.asarray((embeddings - mean) / scale, jnp.float32)
    model = RQVAE(data.shape[1], levels, codebook_size, options, rngs=nnx.Rngs(seed))
    _start_codebooks(model, data, seed)
    _train(model, data, seed, options)
    codes, reconstruction = _encode(model, data, options.batch_size)
    return codes, reconstruction * scale + mean


def _start_codebooks(model: RQVAE, data: Float[Array, "N D"], seed: int) -> None:
    levels, codebook_size, _ = model.codebooks.shape
    latents = np.asarray(model.encoder(data[: 64 * codebook_size]))
    residual, codebooks = latents, []
    for level in range(levels):
        nearest, centroids = kmeans(residual, codebook_size, seed + level)
        codebooks.append(centroids)
        residual = residual - centroids[nearest]
    model.codebooks[...] = jnp.asarray(np.stack(codebooks))


def _train(model: RQVAE, data: Float[Array, "N D"], seed: int, options: Options) -> None:
    optimizer = nnx.Optimizer(model, _adam(options.learning_rate, options.steps), wrt=nnx.Param)
    batch_size = min(options.batch_size, len(data))
    keys = jax.random.split(jax.random.key(seed), options.steps)
    uses = jnp.zeros(model.codebooks.shape[:2], jnp.int32)
    for step, key in enumerate(keys):
        uses, residuals = _step(model, optimizer, data, uses, key, batch_size, options.commitment)
        if (step + 1) % REVIVAL_INTERVAL == 0 and step + REVIVAL_INTERVAL < options.steps:
            _revive(model, uses, residuals)
            uses = jnp.zeros_like(uses)


@functools.cache  # The steps are compiled anew for another one.
def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), max(2, steps)))


@nnx.jit(static_argnums=(5, 6))
def _step(model, optimizer, data, uses, key, batch_size, commitment):
    """One Adam step on a random batch. Returns `uses`, int32 [L, K], updated, and the residuals [L, B, D]."""
    batch = data[jax.random.choice(key, len(data), (batch_size,), replace=False)]
    gradients, (codes, residuals) = nnx.grad(lambda m: m.loss(batch, commitment), has_aux=True)(model)
    optimizer.update(model, gradients)
    uses = jax.vmap(lambda count, code: count.at[code].add(1))(uses, codes.T)
    return uses, residuals


@nnx.jit
def _revive(model, uses, residuals):
    """Moves each level's dead codes onto the residuals that are farthest from the live codes."""
    levels, batch_size, _ = residuals.shape
    codebooks = []
    for level in range(levels):
        codebook, dead = model.codebooks[level], uses[level] == 0
        alive = jnp.where(dead[:, None], jnp.inf, codebook)
        error = jnp.square(residuals[level] - alive[_nearest(residuals[level], alive)]).sum(axis=1)
        worst = jnp.argsort(-error)
        place = (jnp.cumsum(dead) - 1) % batch_size
        codebooks.append(jnp.where(dead[:, None], residuals[level][worst[place]], codebook))
    model.codebooks[...] = jnp.stack(codebooks)


@nnx.jit
def _encode_batch(model: RQVAE, x: Float[Array, "B D"]) -> tuple[Int[Array, "B L"], Float[Array, "B D"]]:
    codes, _, chosen = model.quantize(model.encoder(x))
    return codes, model.decoder(chosen.sum(axis=0))


def _encode(model: RQVAE, data: Float[Array, "N D"], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [_encode_batch(model, data[start : start + batch_size]) for start in range(0, len(data), batch_size)]
    codes, reconstruction = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return codes.astype(np.int32), reconstruction


def _nearest(x: Float[Array, "B D"], codebook: Float[Array, "K D"]) -> Int[Array, " B"]:
    """The nearest code. Codes at infinity are never chosen."""
    distance = jnp.square(codebook).sum(axis=1) - 2 * x @ codebook.T
    return jnp.argmin(jnp.where(jnp.isfinite(distance), distance, jnp.inf), axis=1)


def _squared_error(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, ""]:
    """Squared error: the mean over the batch and D, the sum over levels."""
    error = jnp.square(x - y).mean(axis=(-2, -1))
    return error.sum()
