"""The collectives of a compiled module, and what a device sends in each."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from simgr_jax.compilation.hlo import Computation, Instruction, Module, total_bytes

# What a device of a group of g sends of `size` bytes that it brings in, as rings do it.
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
      bytes: that a device sends, and as many arrive.
    """

    kind: str
    bytes: float


def kind(instruction: Instruction) -> str | None:
    """Of a collective, or of what starts one that goes on in the background; None of other instructions."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in _SENT else None


def collectives(module: Module, computation: Computation, instruction: Instruction) -> Iterator[Collective]:
    """That an instruction is, or that are fused into it."""
    if name := kind(instruction):
        if name == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            name = "reduce-scatter"  # The TPU compiler fuses an all-reduce with the slices that are kept of it.
        size = total_bytes(array for operand in computation.operands(instruction) for array in operand.arrays)
        yield Collective(name, _SENT[name](size, group_size(instruction.attributes, module.devices)))
    elif instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        for inner in fused.instructions.values():
            if not (kind(inner) and goes_on(fused, inner)):
                yield from collectives(module, fused, inner)


def goes_on(fused: Computation, collective: Instruction) -> bool:
    """Whether this has begun in another fusion: the TPU compiler cuts a collective in pieces, a first one, one in each
    fusion that it runs beside, which hands it on, and a last."""
    users = fused.users[collective.name]
    return any(user.opcode == "tuple" or user.call_target == "AsyncCollectiveDone" for user in users)


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part together, of the three ways in which `replica_groups` are printed.

    `{{0,1},{2,3}}`; `[2,8]<=[16]`, 2 groups of 8; `mesh['a'=2,'b'=8] {'b'}`, along named axes or parts of them,
    `'b':(1)4`, where the devices' order may stand between the two.

    Raises:
      ValueError: they are printed in another way.
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
        raise ValueError(f"no replica groups that are known: {attributes[:200]!r}")
    return devices  # All, or a permutation, which has none.
