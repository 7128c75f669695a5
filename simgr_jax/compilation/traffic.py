"""The bytes that an instruction reads from and writes to a device's main memory (HBM on TPUs).

Operands and results in main memory count, but only the parts that are used: a slice counts what it cuts out, an update
what it writes. The estimate is a lower bound, because a kernel may read an operand more than once and arrays are padded
to whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterable

from simgr_jax.compilation import collectives
from simgr_jax.compilation.hlo import Computation, Instruction, Module, Shape, leaves
from simgr_jax.compilation.operations import BOOKKEEPING

# Aliases, waits and control flow. The computations that control flow calls are counted separately.
_FREE = frozenset(
    (
        "add-dependency",
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "domain",
        "get-tuple-element",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    )
)
_CUTS = ("dynamic-slice", "gather", "slice")
_UPDATES = ("dynamic-update-slice", "scatter")
# Within a fusion, slicing the result of one of these reads only a slice of its operand.
_ELEMENTWISE = ("bitcast", "convert", "copy", "negate", "reshape", "transpose")


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes read and written by an instruction that is not fused into another."""
    if _is_free(instruction) or instruction.opcode.endswith(("-done", "-update")):
        return 0.0
    if instruction.opcode.endswith("-start"):
        return _copied(computation, instruction)
    read = sum(
        _read(module, computation, instruction, index) * _in_memory(operand.arrays)
        for index, operand in enumerate(computation.operands(instruction))
    )
    shares = _written(module, computation, instruction)
    return read + sum(share * _in_memory([array]) for share, array in zip(shares, instruction.arrays, strict=True))


def _is_free(instruction: Instruction) -> bool:
    return instruction.opcode in _FREE or instruction.call_target in BOOKKEEPING


def _in_memory(arrays: Iterable[Shape]) -> float:
    return sum(array.bytes for array in arrays if array.memory_space == 0)


def _copied(computation: Computation, start: Instruction) -> float:
    """Bytes read and written by an asynchronous copy, slice or collective.

    The type of `copy-start` is (to, from, ...), that of `all-reduce-start` is its result's, and that of the others is
    (from, to, ...).
    """
    to = start.type[0] if start.opcode == "copy-start" else start.type
    to = start.type[1] if isinstance(to, tuple) and start.opcode != "all-reduce-start" else to
    source = [array for operand in computation.operands(start) for array in operand.arrays]
    read = _in_memory(source)
    if start.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        read *= _share(leaves(to), source)
    return read + _in_memory(leaves(to))


def _share(part: Iterable[Shape], whole: Iterable[Shape]) -> float:
    return min(1.0, sum(array.elements for array in part) / max(sum(array.elements for array in whole), 1))


def _read(module: Module, computation: Computation, user: Instruction, index: int) -> float:
    """The share of an operand that its user reads."""
    if user.opcode in _CUTS and index == 0:
        return _share(user.arrays, computation.operands(user)[0].arrays)
    if (user.opcode in _UPDATES and index == 0) or _is_free(user):
        return 0.0
    if user.opcode == "fusion":
        fused = module.computations[user.called("calls")[0]]
        return _read_by_fused(module, fused, fused.parameters[index])
    return 1.0


def _read_by_fused(module: Module, fused: Computation, operand: Instruction) -> float:
    total = 0.0
    for user in fused.users[operand.name]:
        if user.opcode in _ELEMENTWISE and user is not fused.root:
            total += _read_by_fused(module, fused, user)
        elif collectives.kind(user):
            total += not collectives.goes_on(fused, user)
        else:
            places = [index for index, name in enumerate(user.operands) if name == operand.name]
            total += sum(_read(module, fused, user, index) for index in places)
    return min(total, 1.0)


def _written(module: Module, computation: Computation, instruction: Instruction) -> list[float]:
    """For each array of the result, the share that is written."""
    count = len(instruction.arrays)
    if instruction.opcode == "dynamic-update-slice":
        return [_share(computation.operands(instruction)[1].arrays, instruction.arrays)]
    if instruction.opcode == "scatter":
        return [_share(computation.operands(instruction)[-1].arrays, instruction.arrays[:1])] * count
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        return _written_by_root(module, fused, fused.root)
    return [1.0] * count


def _written_by_root(module: Module, fused: Computation, root: Instruction) -> list[float]:
    if root.opcode == "tuple":
        return [share for element in fused.operands(root) for share in _written_by_root(module, fused, element)]
    if root.opcode == "bitcast":
        return _written_by_root(module, fused, fused.operands(root)[0])
    # A passed-on value already exists, and an asynchronous collective writes its result only when it ends.
    handed_on = root.opcode == "parameter" or collectives.kind(root) or root.call_target == "AsyncCollectiveStart"
    return [0.0] * len(root.arrays) if handed_on else _written(module, fused, root)
