"""Weights from a checkpoint to the devices, without the host ever holding more than a few pieces of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.families import Source
from simgr_jax.models.transformer import Transformer, TransformerConfig

# What is read at once, unless the devices' shares of a tensor leave no axis whole to cut it along.
_PIECE_BYTES = 16 * 2**20

# From and to, on each axis of a layer as it is in the file.
Bounds = tuple[tuple[int, int], ...]

Shardings = Callable[[str, tuple[int, ...]], Sharding]


def load_transformer(
    checkpoint: Checkpoint, config: TransformerConfig, param_dtype: str, shardings: Shardings | None = None
) -> Transformer:
    """The decoder of a checkpoint.

    Every tensor is looked up and its shape compared before the first is read. Then each parameter's buffer is made on
    the devices, and the layers' tensors are written into it piece by piece; a process reads only what its own devices
    hold.

    Args:
      config: `families.transformer_config` of the checkpoint's config.
      param_dtype: "float32" or "bfloat16", what the parameters are kept in.
      shardings: of a parameter, by its path ("layers.self_attn.q_proj.kernel") and shape, which must leave the layers'
        axis whole; None puts all of them on this process's first device.

    Raises:
      UserError: a tensor is missing, of another shape than the config says, or quantised.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    parameters = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    sources = families.sources(checkpoint.config, checkpoint.names())
    if parameters.keys() != sources.keys():
        raise ValueError(f"parameters without a source, or the reverse: {sorted(parameters.keys() ^ sources.keys())}")
    prefix = families.prefix(checkpoint.config, checkpoint.names())
    leaves = {path: _Leaf(variable.shape, sources[path], prefix) for path, variable in parameters.items()}
    for name, shape in _tensor_shapes(leaves.values()).items():
        checkpoint.require(name, shape)
    for path, variable in parameters.items():
        sharding = shardings(path, variable.shape) if shardings else None
        variable.set_value(_load(checkpoint, leaves[path], param_dtype, sharding))
    return nnx.merge(graphdef, abstract)


def embedding_name(checkpoint: Checkpoint) -> str:
    """The tensor of the token embedding, which is [V, D] by the checkpoint's config.

    Raises:
      UserError: it is missing, of another shape, or quantised.
    """
    config = families.text_config(checkpoint.config)
    name = families.prefix(checkpoint.config, checkpoint.names()) + families.EMBEDDING[checkpoint.config.model_type]
    checkpoint.require(name, (config.vocab_size, config.hidden_size))
    return name


def read_embedding_rows(checkpoint: Checkpoint, rows: Sequence[int]) -> Float[np.ndarray, "R D"]:
    """float32 rows of the token embedding; nothing else of it is read.

    Raises:
      UserError: as `embedding_name`.
      IndexError: there is no such row.
    """
    return checkpoint.read_rows(embedding_name(checkpoint), rows).astype(np.float32)


def embedding_statistics(checkpoint: Checkpoint) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Mean and standard deviation of the token embedding's columns over its rows, float32 (summed in float64).

    Raises:
      UserError: as `embedding_name`.
    """
    name = embedding_name(checkpoint)
    rows, width = checkpoint.shape(name)
    total, total_squares = np.zeros(width), np.zeros(width)
    for start, stop in _cuts(rows, 8 * width):
        block = checkpoint.read(name, (slice(start, stop),)).astype(np.float64)
        total += block.sum(axis=0)
        total_squares += np.square(block, out=block).sum(axis=0)
    mean = total / rows
    variance = np.maximum(total_squares / rows - mean**2, 0)  # rounding may leave a constant column below 0
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


class _Leaf:
    """A parameter, and the tensors it is made of.

    A tensor for each layer and expert, if the parameter has such axes, each with the rest of the parameter's axes. "In
    the file" these may be swapped, or part of a longer one.
    """

    def __init__(self, shape: tuple[int, ...], source: Source, prefix: str = ""):
        self.shape, self.source, self.prefix = shape, source, prefix
        self.stacked, self.has_experts = "{layer}" in source.name, "{expert}" in source.name
        self.layers = range(shape[0]) if self.stacked else range(1)
        self.layer_shape = self.swap(shape[self.stacked :])

    def swap(self, axes: Sequence) -> tuple:
        """From the axes of a layer of the parameter to those in the file, and back."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.source.transpose else tuple(axes)

    def name(self, layer: int, expert: int = 0) -> str:
        return self.prefix + self.source.name.format(layer=layer, expert=expert)

    def names(self) -> Iterator[str]:
        experts = range(self.layer_shape[0]) if self.has_experts else range(1)
        return itertools.starmap(self.name, itertools.product(self.layers, experts))

    def read(self, checkpoint: Checkpoint, layer: int, bounds: Sequence[tuple[int, int]]) -> Shaped[np.ndarray, "*S"]:
        """What lies within `bounds` of a layer."""
        index = [slice(*bound) for bound in bounds]
        if self.source.part:
            axis, offset, _ = self.source.part
            axis += self.has_experts
            index[axis] = slice(index[axis].start + offset, index[axis].stop + offset)
        if not self.has_experts:
            return checkpoint.read(self.name(layer), tuple(index))
        return np.stack([checkpoint.read(self.name(layer, e), tuple(index[1:])) for e in range(*bounds[0])])


def _tensor_shapes(leaves: Iterable[_Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor should have; one that several parameters are parts of ends with the last of them."""
    shapes = {}
    for leaf in leaves:
        shape = list(leaf.layer_shape[leaf.has_experts :])
        if leaf.source.part:
            axis, _, shape[axis] = leaf.source.part
        for name in leaf.names():
            shapes[name] = tuple(map(max, shapes.get(name, shape), shape))
    return shapes


def _load(checkpoint: Checkpoint, leaf: _Leaf, dtype: str, sharding: Sharding | None) -> Array:
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])

    def write(parameter, piece, start):
        piece = piece.transpose(leaf.swap(range(piece.ndim))).astype(dtype)
        return jax.lax.dynamic_update_slice(parameter, piece[None] if leaf.stacked else piece, start)

    write = jax.jit(write, donate_argnums=0, out_shardings=sharding)
    parameter = jax.jit(lambda: jnp.zeros(leaf.shape, dtype), out_shardings=sharding)()
    piece_sharding, cuts = _pieces(leaf, sharding)
    for layer, bounds in itertools.product(leaf.layers, cuts):
        piece = _read_piece(checkpoint, leaf, layer, bounds, piece_sharding)
        start = leaf.swap([first for first, _ in bounds])
        parameter.block_until_ready()  # One piece is read while another is written, but no more are held.
        parameter = write(parameter, piece, (layer, *start) if leaf.stacked else start)
    return parameter


def _read_piece(checkpoint: Checkpoint, leaf: _Leaf, layer: int, bounds: Bounds, sharding: Sharding) -> Array:
    shape = tuple(stop - start for start, stop in bounds)

    @functools.cache  # Devices may hold the same.
    def read(share: Bounds) -> np.ndarray:
        shifted = [(first + start, first + stop) for (first, _), (start, stop) in zip(bounds, share, strict=True)]
        return leaf.read(checkpoint, layer, shifted)

    def share_of_device(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, share_of_device)


def _pieces(leaf: _Leaf, sharding: Sharding) -> tuple[Sharding, list[Bounds]]:
    """How a layer is cut for reading: the sharding of a piece and the pieces' bounds, axes as in the file."""
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*leaf.swap(spec[leaf.stacked :])))
    shape, share = leaf.layer_shape, sharding.shard_shape(leaf.layer_shape)
    whole = tuple((0, size) for size in shape)
    # Cut where the devices do not cut, so that a piece lies on them as the parameter does.
    axis = next((axis for axis, size in enumerate(shape) if share[axis] == size), None)
    if axis is None:
        return sharding, [whole]
    cuts = _cuts(shape[axis], 4 * math.prod(shape) // shape[axis])
    return sharding, [(*whole[:axis], cut, *whole[axis + 1 :]) for cut in cuts]


def _cuts(size: int, row_bytes: int) -> list[tuple[int, int]]:
    """`range(size)` cut into (from, to) of about _PIECE_BYTES at most, all but the last of one length."""
    step = math.ceil(size / math.ceil(size * row_bytes / _PIECE_BYTES))
    return [(start, min(start + step, size)) for start in range(0, size, step)]
