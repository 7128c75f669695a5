"""How arrays are split over devices: one mesh, and one table from logical axes to mesh axes.

A parameter declares its logical axes where it is made, `nnx.Param(value, axes=("embed", "heads"))`; RULES maps them to
mesh axes, and nothing else names a mesh axis. To try another sharding, change RULES.

Everything runs within `jax.set_mesh(make_mesh(...))`, so compiled code finds the mesh in its context. Without a mesh,
every function here leaves arrays as they are, on one device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from simgr_jax.devices.chips import CHIPS
from simgr_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_AUTO = (AxisType.Auto,) * len(AXES)

# The mesh axes that each logical axis is split over. "data" keeps copies of everything that "fsdp" and "tensor" split,
# so only gradients travel across slow networks.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "items": ("fsdp", "tensor"),
    # Rows of the batch while the catalog is scored: each copy of the catalog scores the rows of its own data shard.
    "queries": ("data",),
}


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`.

    Args:
      devices: None uses all devices; to compile for a topology, give its devices.

    Raises:
      UserError: the axes' sizes don't match the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in AXES]
    given = math.prod(size for size in sizes if size > 0)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh: {_named(sizes)} is not a mesh; give sizes from 1, and -1 to at most one axis")
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        raise UserError(
            f"config.mesh: {_named(sizes)} does not match {len(devices)} devices; their product must, and one axis "
            "of -1 takes all that are left"
        )
    sizes = [len(devices) // given if size == -1 else size for size in sizes]
    # GPU hosts also have a slice index, but parameters may be split between them.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if slices == 1:
        # Otherwise an axis would have to be made of whole sides of the slice.
        order = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(order, AXES, axis_types=_AUTO)
    data, *within = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data: {data} can't be split over {slices} slices of TPUs; give a multiple, so that only "
            "gradients travel between them"
        )
    sizes = (data // slices, *within)
    order = mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(order, AXES, axis_types=_AUTO)


def _named(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def current_mesh() -> Mesh:
    """The context's mesh, or one of this process's first device."""
    mesh = jax.sharding.get_mesh()
    return one_device() if mesh.empty else mesh


def one_device() -> Mesh:
    """A mesh of this process's first device."""
    return jax.make_mesh((1, 1, 1), AXES, axis_types=_AUTO, devices=jax.local_devices()[:1])


def platform() -> str:
    """The platform of the context's mesh: "cpu", "gpu" or "tpu". The mesh may only be compiled for, not present."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_memory() -> int:
    """The memory of one device of the context's mesh, in bytes. CPU devices share the host's memory.

    The mesh may only be compiled for, not present.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kind = None if mesh.empty else mesh.abstract_device.device_kind
    for chip in CHIPS.values():
        if chip.device_kind == kind:
            return int(chip.hbm_gib * 2**30)
    statistics = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return statistics.get("bytes_limit", host // jax.local_device_count())


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array, from the logical axis of each array axis; None is not split."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shards(axis: str) -> int:
    """How many parts the context's mesh splits a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis])


def item_axes() -> tuple[str, ...]:
    """The mesh axes that the catalog is split over; () if it is not split."""
    return RULES["items"] if shards("items") > 1 else ()


def constrain(x: Shaped[Array, "*axes"], *axes: str | None) -> Shaped[Array, "*axes"]:
    """x, split by its logical axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes that a variable declares for its last array axes; () if it declares none. Array axes before them
    (layers, experts) are never split."""
    return variable.get_metadata("axes", ())


def array_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How `mesh` splits an array whose last axes have these logical axes. An axis that can't be split evenly stays
    whole."""
    if not axes or len(axes) > len(shape):  # An optimizer may keep a scalar in a parameter's place.
        return PartitionSpec()
    leading = (None,) * (len(shape) - len(axes))
    split = [
        None if axis is None or size % math.prod(mesh.shape[name] for name in RULES[axis]) else RULES[axis]
        for axis, size in zip(axes, shape[len(leading) :], strict=True)
    ]
    return PartitionSpec(*leading, *split)


def variable_sharding(variable: nnx.Variable) -> NamedSharding:
    """The sharding, on the current mesh, of a variable that holds an array or its shape."""
    mesh = current_mesh()
    return NamedSharding(mesh, array_spec(axes_of(variable), variable.get_value().shape, mesh))


def shardings(tree: Any) -> Any:
    """The sharding of every array in a tree (a module's state, a TrainState), in the tree's own structure."""
    mesh = current_mesh()

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        axes = axes_of(variable)
        return jax.tree.map(lambda x: NamedSharding(mesh, array_spec(axes, x.shape, mesh)), variable)

    return _map_variables(of_variable, tree, lambda _: replicated())


def _map_variables(function: Callable[[nnx.Variable], Any], tree: Any, otherwise: Callable[[Any], Any]) -> Any:
    """Applies `function` to every variable of a tree, and `otherwise` to every other leaf."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda node: (function if is_variable(node) else otherwise)(node), tree, is_leaf=is_variable)


def _filled(variable: nnx.Variable, value: Any) -> nnx.Variable:
    """The variable with `value` in its array's place."""
    return jax.tree.map(lambda _: value, variable)


def replicated() -> NamedSharding:
    return NamedSharding(current_mesh(), PartitionSpec())


def create(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`make(rngs)`, where each device makes only its own part of the parameters."""
    if current_mesh().size == 1:
        return make(rngs)  # Compiling would take longer.
    graphdef, abstract = nnx.split(nnx.eval_shape(make, rngs))
    rngs_graphdef, rngs_state = nnx.split(rngs)

    def initial(rngs_state):
        rngs = nnx.merge(rngs_graphdef, rngs_state)
        return nnx.state(make(rngs)), nnx.state(rngs)

    state, rngs_state = jax.jit(initial, out_shardings=(shardings(abstract), None))(rngs_state)
    nnx.update(rngs, rngs_state)
    return nnx.merge(graphdef, state)


def place(module: nnx.Module) -> None:
    """Spreads a module's arrays over the current mesh, in place. Every process must have the same values."""
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(_put, state, shardings(state)))


def _put(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch_like(batch: Any) -> Any:
    """The shapes of a batch's arrays, split along their first axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_by_batch()), batch)


def join_batch(rows: Any) -> Any:
    """The whole batch, from the rows that this process has for its own devices (numpy arrays)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(_by_batch(), x), rows)


def split_batch(batch: Any) -> Any:
    """The batch with its rows split over devices; every process has the whole batch (numpy arrays)."""
    return jax.tree.map(lambda x: _put(x, _by_batch()), batch)


def _by_batch() -> NamedSharding:
    return NamedSharding(current_mesh(), spec("batch"))


def gather_kernels(layer: Any, dtype: str) -> Any:
    """A layer's parameters as its computation needs them: in `dtype`, and whole along "embed".

    Parameters are cast before they travel between devices, and stay split along "heads" and "mlp". Those without
    logical axes are returned as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def gathered(variable: nnx.Variable) -> nnx.Variable:
        if not any(axes_of(variable)):
            return variable
        x = variable.get_value().astype(dtype)
        return _filled(
            variable,
            x if mesh.empty else _gather(x, _gathered_spec(variable), array_spec(axes_of(variable), x.shape, mesh)),
        )

    return _map_variables(gathered, layer, lambda leaf: leaf)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, gathered: PartitionSpec, own: PartitionSpec) -> Array:
    """x split as `gathered`, and its gradient split as `own`.

    A plain constraint would split the gradient like x: every device would sum up the whole gradient and then split it.
    """
    return jax.lax.with_sharding_constraint(x, gathered)


_gather.defvjp(
    lambda x, gathered, own: (_gather(x, gathered, own), None),
    lambda gathered, own, _, gradient: (jax.lax.with_sharding_constraint(gradient, own),),
)


def gathered_specs(layer: Any) -> Any:
    """The PartitionSpecs of the arrays that `gather_kernels` gives, in the structure of `layer`."""
    return _map_variables(
        lambda variable: _filled(variable, _gathered_spec(variable)), layer, lambda leaf: spec(*(None,) * leaf.ndim)
    )


def _gathered_spec(variable: nnx.Variable) -> PartitionSpec:
    axes = axes_of(variable)
    leading = (None,) * (variable.get_value().ndim - len(axes))
    return spec(*leading, *(None if axis == "embed" else axis for axis in axes))


def per_device(function: Callable, in_specs: Sequence[Any], out_specs: Any, check_vma: bool = True) -> Callable:
    """`function`, called on every device with the device's parts of the arrays; without a mesh, `function` itself.

    Args:
      check_vma: whether JAX tracks which values differ between devices, which kernels don't support.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check_vma)


def _is_split(axis: str) -> bool:
    """Whether this runs within `per_device`, where each device has its own part of a logical axis."""
    return set(RULES[axis]) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def psum(x: Array, axis: str) -> Array:
    """The sum over the parts of a logical axis; x itself if the axis is whole."""
    return jax.lax.psum(x, RULES[axis]) if _is_split(axis) else x


def all_gather(x: Shaped[Array, "B C"], axis: str) -> Shaped[Array, "B C_all"]:
    """The parts' columns, one after the other; x itself if the logical axis is whole."""
    return jax.lax.all_gather(x, RULES[axis], axis=1, tiled=True) if _is_split(axis) else x


def part_index(axis: str) -> Array | int:
    """The index of this device's part of a logical axis; 0 if the axis is whole."""
    return jax.lax.axis_index(RULES[axis]) if _is_split(axis) else 0
