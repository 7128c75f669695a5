"""Loads weights from a checkpoint to the devices piece by piece, so that the host holds only a few pieces at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.families import Source
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import TransformerConfig

# The most bytes in one piece, except that a layer whose axes are all sharded is one piece.
_PIECE_BYTES = 16 * 2**20

# (start, stop) on each axis of a layer, in the file's axis order.
Bounds = tuple[tuple[int, int], ...]

Shardings = Callable[[nnx.Variable], Sharding]


def load_transformer(
    checkpoint: Checkpoint, config: TransformerConfig, param_dtype: str, shardings: Shardings | None = None
) -> Transformer:
    """The decoder of a checkpoint.

    All tensors' names and shapes are checked before any is read. Then each parameter's buffer is allocated on the
    devices, and the layers' tensors are written into it piece by piece. A process reads only what its own devices hold.
    What a checkpoint has beside a language model (vision and audio towers, heads that predict several tokens) is left
    out, and a line says so.

    Args:
      config: the result of `families.transformer_config` for the checkpoint's config, or its first layers.
      param_dtype: "float32" or "bfloat16", the parameters' dtype.
      shardings: maps a parameter's variable, which holds its shape, to a sharding that does not split the layers' axis.
        None puts all parameters on this process's first device.

    Raises:
      UserError: a tensor is missing, is quantized, or has a shape that disagrees with the config.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    parameters = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    sources = families.sources(checkpoint.config, checkpoint.names(), config)
    if parameters.keys() != sources.keys():
        raise ValueError(f"parameters without a source, or the reverse: {sorted(parameters.keys() ^ sources.keys())}")
    prefix = families.prefix(checkpoint.config, checkpoint.names())
    leaves = {path: _Leaf(variable.shape, sources[path], prefix) for path, variable in parameters.items()}
    for name, shape in _tensor_shapes(leaves.values()).items():
        checkpoint.require(name, shape)
    if others := other_parts(checkpoint.names(), prefix):
        logging.info("%s: only the language model is loaded, not %s", checkpoint.path, ", ".join(others))
    for path, variable in parameters.items():
        sharding = shardings(variable) if shardings else None
        variable.set_value(_load(checkpoint, leaves[path], param_dtype, sharding))
    return nnx.merge(graphdef, abstract)


def other_parts(names: Collection[str], prefix: str) -> list[str]:
    """The modules of a checkpoint beside its decoder and language-model head, like "model.vision_tower"."""
    inside, parts = prefix.split(".")[:-1], set()
    for name in names:
        if not name.startswith(prefix) and not name.endswith("lm_head.weight"):
            path = name.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(path, inside, strict=False)) if a != b), len(inside))
            parts.add(".".join(path[: shared + 1]))
    return sorted(parts)


def embedding_name(checkpoint: Checkpoint) -> str:
    """The name of the token embedding's tensor, whose shape must be the [V, D] of the checkpoint's config.

    Raises:
      UserError: the tensor is missing, is quantized, or has another shape.
    """
    config = families.text_config(checkpoint.config)
    name = families.prefix(checkpoint.config, checkpoint.names()) + families.EMBEDDING[checkpoint.config.model_type]
    checkpoint.require(name, (config.vocab_size, config.hidden_size))
    return name


def read_embedding_rows(checkpoint: Checkpoint, rows: Sequence[int]) -> Float[np.ndarray, "R D"]:
    """Rows of the token embedding in float32. No other rows are read.

    Raises:
      UserError: as for `embedding_name`.
      IndexError: there is no such row.
    """
    return checkpoint.read_rows(embedding_name(checkpoint), rows).astype(np.float32)


def per_layer_embedding_name(checkpoint: Checkpoint) -> str | None:
    """The name of the tensor of the tokens' embeddings for each layer; None if the decoder has none.

    Raises:
      UserError: as for `embedding_name`.
    """
    config = families.text_config(checkpoint.config)
    if not (width := getattr(config, "hidden_size_per_layer_input", 0)):
        return None
    name = families.prefix(checkpoint.config, checkpoint.names()) + "embed_tokens_per_layer.weight"
    checkpoint.require(name, (config.vocab_size_per_layer_input, config.num_hidden_layers * width))
    return name


def read_input_rows(checkpoint: Checkpoint, rows: Sequence[int]) -> Float[np.ndarray, "R E"]:
    """`read_embedding_rows`, followed by the tokens' embeddings for each layer if the decoder has such (see
    `TransformerConfig.input_width`).

    Raises:
      UserError: as for `embedding_name`.
      IndexError: there is no such row.
    """
    embeddings, per_layer = read_embedding_rows(checkpoint, rows), per_layer_embedding_name(checkpoint)
    if per_layer is None:
        return embeddings
    return np.concatenate([embeddings, checkpoint.read_rows(per_layer, rows).astype(np.float32)], axis=1)


def embedding_statistics(checkpoint: Checkpoint) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Mean and standard deviation of each column of the token embedding, float32 (summed in float64).

    Raises:
      UserError: as for `embedding_name`.
    """
    name = embedding_name(checkpoint)
    rows, width = checkpoint.shape(name)
    total, total_squares = np.zeros(width), np.zeros(width)
    for start, stop in _cuts(rows, 8 * width):
        block = checkpoint.read(name, (slice(start, stop),)).astype(np.float64)
        total += block.sum(axis=0)
        total_squares += np.square(block, out=block).sum(axis=0)
    mean = total / rows
    variance = np.maximum(total_squares / rows - mean**2, 0)  # Rounding can make it negative for a constant column.
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


class _Leaf:
    """A parameter and the checkpoint tensors that make it up.

    If the parameter has axes for layers and experts, there is one tensor per layer and expert, with the parameter's
    other axes. In the file, the last two axes may be swapped, or the tensor may be part of a larger one.
    """

    def __init__(self, shape: tuple[int, ...], source: Source, prefix: str = ""):
        self.shape, self.source, self.prefix = shape, source, prefix
        self.stacked, self.has_experts = "{layer}" in source.name, "{expert}" in source.name
        self.layers = source.layers if self.stacked else (0,)
        self.layer_shape = self.swap(shape[self.stacked :])

    def swap(self, axes: Sequence) -> tuple:
        """Converts one layer's axes from our order to the file's, or back."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.source.transpose else tuple(axes)

    def name(self, layer: int, expert: int = 0) -> str:
        return self.prefix + self.source.name.format(layer=layer, expert=expert)

    def names(self) -> Iterator[str]:
        experts = range(self.layer_shape[0]) if self.has_experts else range(1)
        return itertools.starmap(self.name, itertools.product(self.layers, experts))

    def read(self, checkpoint: Checkpoint, layer: int, bounds: Sequence[tuple[int, int]]) -> Shaped[np.ndarray, "*S"]:
        """The part of a layer within `bounds`."""
        index = [slice(*bound) for bound in bounds]
        if self.source.part:
            axis, offset, _ = self.source.part
            axis += self.has_experts
            index[axis] = slice(index[axis].start + offset, index[axis].stop + offset)
        if not self.has_experts:
            return checkpoint.read(self.name(layer), tuple(index))
        return np.stack([checkpoint.read(self.name(layer, e), tuple(index[1:])) for e in range(*bounds[0])])


def _tensor_shapes(leaves: Iterable[_Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor should have. A tensor made of several parameters ends where the last of them ends."""
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
    for (row, layer), bounds in itertools.product(enumerate(leaf.layers), cuts):
        piece = _read_piece(checkpoint, leaf, layer, bounds, piece_sharding)
        start = leaf.swap([first for first, _ in bounds])
        parameter.block_until_ready()  # Read one piece while another is written, but hold no more than these two.
        parameter = write(parameter, piece, (row, *start) if leaf.stacked else start)
    return parameter


def _read_piece(checkpoint: Checkpoint, leaf: _Leaf, layer: int, bounds: Bounds, sharding: Sharding) -> Array:
    shape = tuple(stop - start for start, stop in bounds)

    @functools.cache  # Several devices may hold the same part.
    def read(share: Bounds) -> np.ndarray:
        shifted = [(first + start, first + stop) for (first, _), (start, stop) in zip(bounds, share, strict=True)]
        return leaf.read(checkpoint, layer, shifted)

    def share_of_device(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, share_of_device)


def _pieces(leaf: _Leaf, sharding: Sharding) -> tuple[Sharding, list[Bounds]]:
    """How a layer is cut for reading: a piece's sharding and all pieces' bounds, in the file's axis order."""
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*leaf.swap(spec[leaf.stacked :])))
    shape, share = leaf.layer_shape, sharding.shard_shape(leaf.layer_shape)
    whole = tuple((0, size) for size in shape)
    # Cut along an unsharded axis, so that a piece is sharded like the parameter.
    axis = next((axis for axis, size in enumerate(shape) if share[axis] == size), None)
    if axis is None:
        return sharding, [whole]
    cuts = _cuts(shape[axis], 4 * math.prod(shape) // shape[axis])
    return sharding, [(*whole[:axis], cut, *whole[axis + 1 :]) for cut in cuts]


def _cuts(size: int, row_bytes: int) -> list[tuple[int, int]]:
    """`range(size)` cut into (start, stop) of at most about _PIECE_BYTES, all but the last of equal length."""
    step = math.ceil(size / math.ceil(size * row_bytes / _PIECE_BYTES))
    return [(start, min(start + step, size)) for start in range(0, size, step)]
