"""Trip counts of the loops in a compiled module.

The CPU compiler annotates a loop with its trip count; the TPU compiler does not. But a loop's counters are scalars
computed from constants, so it is enough to evaluate the loop's condition and body for these scalars.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence

from simgr_jax.compilation.hlo import Computation, Instruction, Module, Shape

# A scalar's value, or a function from an index to the value of a tuple's element. None: an array, or unknown.
Scalar = int | bool | None
Value = Scalar | Callable[[int], Scalar]

# A loop that runs longer counts as one of unknown length.
_MOST_TRIPS = 10_000_000

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_COMPARE = {name.upper(): getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_SAME = ("copy", "bitcast", "convert", "reshape", "optimization-barrier", "copy-start", "copy-done")


def evaluate(module: Module, computation: Computation, name: str, arguments: Sequence[Value]) -> Value:
    """An instruction's value, as far as it is known.

    Args:
      arguments: the values of the computation's arguments.
    """
    instruction = computation.instructions[name]
    if not isinstance(instruction.type, Shape):
        return functools.cache(lambda index: _element(module, computation, instruction, arguments, index))
    if instruction.type.dims or instruction.type.dtype[0] == "f":
        return None
    opcode = instruction.opcode
    values = lambda: [evaluate(module, computation, operand, arguments) for operand in instruction.operands]  # noqa: E731
    if opcode == "parameter":
        return _argument(instruction, arguments)
    if opcode == "constant":
        return _constant(instruction.literal)
    if opcode == "get-tuple-element":
        whole = values()[0]
        return whole(int(instruction.attribute("index"))) if callable(whole) else None
    if opcode in _SAME:
        return values()[0]
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        return evaluate(module, called, called.root.name, values())
    if opcode in _BINARY or opcode == "compare":
        left, right = values()
        if left is None or right is None:
            return None
        return (_BINARY.get(opcode) or _COMPARE[instruction.attribute("direction")])(left, right)
    return None


def _element(
    module: Module, computation: Computation, instruction: Instruction, arguments: Sequence[Value], index: int
) -> Scalar:
    """The value of one element of an instruction that is a tuple."""
    opcode = instruction.opcode
    if opcode == "tuple":
        value = evaluate(module, computation, instruction.operands[index], arguments)
    elif opcode == "parameter":
        value = _argument(instruction, arguments)
        value = value(index) if callable(value) else None
    elif opcode == "while" or opcode in _SAME:
        value = None
        if opcode != "while" or _hands_on(module.computations[instruction.called("body")[0]], index):
            operand = evaluate(module, computation, instruction.operands[0], arguments)
            value = operand(index) if callable(operand) else None
    else:
        value = None
    return None if callable(value) else value


def _argument(parameter: Instruction, arguments: Sequence[Value]) -> Value:
    index = int(parameter.literal)
    return arguments[index] if index < len(arguments) else None


def trip_count(module: Module, computation: Computation, loop: Instruction, arguments: Sequence[Value]) -> int | None:
    """How often a `while` loop's body runs each time the loop is reached; None if unknown.

    Args:
      computation: the computation that contains the loop.
      arguments: the values of the computation's arguments.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition, body = (module.computations[loop.called(name)[0]] for name in ("condition", "body"))
    state = evaluate(module, computation, loop.operands[0], arguments)
    for trips in range(_MOST_TRIPS):
        goes_on = evaluate(module, condition, condition.root.name, [state])
        if goes_on is None:
            return None
        if not goes_on:
            return trips
        state = evaluate(module, body, body.root.name, [state])
    return None


def invariants(module: Module, computation: Computation, loop: Instruction, arguments: Sequence[Value]) -> Value:
    """The values in a loop's state that are the same in every iteration; None for those that change.

    Args: as in `trip_count`.
    """
    return evaluate(module, computation, loop.name, arguments)


def _hands_on(body: Computation, index: int) -> bool:
    """Whether an iteration leaves an element of the loop's state unchanged."""
    if body.root.opcode != "tuple":
        return False
    element = body.instructions[body.root.operands[index]]
    while element.opcode in ("copy", "bitcast"):
        element = body.instructions[element.operands[0]]
    return (
        element.opcode == "get-tuple-element"
        and element.attribute("index") == str(index)
        and body.instructions[element.operands[0]].opcode == "parameter"
    )


def _constant(literal: str) -> Scalar:
    if literal in ("true", "false"):
        return literal == "true"
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None
