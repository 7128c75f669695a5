"""The cost of one run of a compiled module per device: operations, memory traffic and collectives.

XLA's own cost analysis counts a loop's body once, however often it runs; here it counts every time. The numbers come
from the optimised HLO, so they are what the device does, including recomputation and work that several devices repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from simgr_jax.compilation import loops
from simgr_jax.compilation.collectives import collectives
from simgr_jax.compilation.hlo import Computation, Instruction, Module, parse
from simgr_jax.compilation.operations import flops
from simgr_jax.compilation.traffic import memory_bytes


class Traffic(NamedTuple):
    """The number of collectives of one kind, and the bytes that a device sends in them (`collectives.Collective`)."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """
    Attributes:
      flops: see `operations.flops`.
      memory_bytes: see `traffic`.
      collectives: by kind.
      uncounted: kernels and loops of unknown cost, which these figures leave out, and how often each runs.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    uncounted: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def collective_bytes(self) -> float:
        return sum(traffic.bytes for traffic in self.collectives.values())

    def __add__(self, other: Cost) -> Cost:
        both = dict(self.collectives)
        for kind, (count, size) in other.collectives.items():
            before = both.get(kind, Traffic(0, 0.0))
            both[kind] = Traffic(before.count + count, before.bytes + size)
        uncounted = dict(self.uncounted)
        for name, count in other.uncounted.items():
            uncounted[name] = uncounted.get(name, 0) + count
        return Cost(self.flops + other.flops, self.memory_bytes + other.memory_bytes, both, uncounted)

    def __mul__(self, times: int) -> Cost:
        return Cost(
            self.flops * times,
            self.memory_bytes * times,
            {kind: Traffic(count * times, size * times) for kind, (count, size) in self.collectives.items()},
            {name: count * times for name, count in self.uncounted.items()},
        )


def cost(text: str) -> Cost:
    """
    Args:
      text: `compiled.as_text()`.
    """
    module = parse(text)
    return _computation(module, module.entry, ())


def _computation(module: Module, computation: Computation, arguments: Sequence[loops.Value]) -> Cost:
    """arguments: the known values of the computation's arguments, from which its loops' trip counts follow."""
    total = Cost()
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            total += _loop(module, computation, instruction, arguments)
        elif instruction.opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            branches = [_computation(module, module.computations[name], ()) for name in names]
            total += max(branches, key=lambda branch: (branch.flops, branch.memory_bytes))
        elif instruction.opcode in ("call", "async-start"):
            values = [loops.evaluate(module, computation, name, arguments) for name in instruction.operands]
            for name in instruction.called("to_apply", "calls"):
                total += _computation(module, module.computations[name], values)
        else:
            total += _instruction(module, computation, instruction)
    return total


def _loop(module: Module, computation: Computation, loop: Instruction, arguments: Sequence[loops.Value]) -> Cost:
    trips = loops.trip_count(module, computation, loop, arguments)
    known = [loops.invariants(module, computation, loop, arguments)]
    condition, body = (module.computations[loop.called(name)[0]] for name in ("condition", "body"))
    turn = _computation(module, condition, known) + _computation(module, body, known)
    if trips is None:
        return turn + Cost(uncounted={f"{loop.name} after its first turn": 1})
    return turn * trips


def _instruction(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    operations, unknown = flops(module, computation, instruction)
    total = Cost(operations, memory_bytes(module, computation, instruction), uncounted=dict.fromkeys(unknown, 1))
    for collective in collectives(module, computation, instruction):
        total += Cost(collectives={collective.kind: Traffic(1, collective.bytes)})
    return total
