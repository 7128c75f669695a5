"""The collectives of a compiled module and the bytes that a device sends in each."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from simgr_jax.compilation.hlo import Computation, Instruction, Module, total_bytes

# The bytes that a device sends in a ring algorithm, given its `size` bytes of operands and a group of g devices.
_SENT = {
    "all-gather": lambda size, g: size * (g - 1),
    "all-reduce": lambda size, g: 2 * size * (g - 1) / g,
    "all-to-all": lambda size, g: size * (g - 1) / g,
    "collective-broadcast": lambda size, g: size,
    "collective-permute": lambda size, g: size,
    "ragged-all-to-all": lambda size, g: size * (g - 1) / g,
    "reduce-scatter": lambda size, g: size * (g - 1) / g,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """
    Attributes:
      kind: a key of `_SENT`.
      bytes: sent by each device, which also receives as many.
    """

    kind: str
    bytes: float


def kind(instruction: Instruction) -> str | None:
    """The kind of a collective or of the start of an asynchronous one; None for other instructions."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in _SENT else None


def collectives(module: Module, computation: Computation, instruction: Instruction) -> Iterator[Collective]:
    """The collective that an instruction is, or those fused into it."""
    if name := kind(instruction):
        if name == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            name = "reduce-scatter"  # The TPU compiler fuses an all-reduce with the slicing of its result.
        size = total_bytes(array for operand in computation.operands(instruction) for array in operand.arrays)
        yield Collective(name, _SENT[name](size, group_size(instruction.attributes, module.devices)))
    elif instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        for inner in fused.instructions.values():
            if not (kind(inner) and goes_on(fused, inner)):
                yield from collectives(module, fused, inner)


def goes_on(fused: Computation, collective: Instruction) -> bool:
    """Whether this part of a collective continues one that began in another fusion.

    The TPU compiler splits an asynchronous collective into a start, one part in each fusion that it overlaps with, and
    an end.
    """
    users = fused.users[collective.name]
    return any(user.opcode == "tuple" or user.call_target == "AsyncCollectiveDone" for user in users)


def group_size(attributes: str, devices: int) -> int:
    """The number of devices in a group, from any of the three forms in which XLA prints `replica_groups`.

    The forms are `{{0,1},{2,3}}`; `[2,8]<=[16]` (2 groups of 8); and `mesh['a'=2,'b'=8] {'b'}` (groups along named axes
    or parts of them, `'b':(1)4`), which may have the order of the devices in between.

    Raises:
      ValueError: they are printed in another form.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if "replica_groups=" in attributes.replace("replica_groups={}", ""):
        raise ValueError(f"replica_groups: unknown form in {attributes[:200]!r}")
    return devices  # No groups: all devices, or a permutation.
