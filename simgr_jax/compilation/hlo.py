"""Parses a compiled module's text (`compiled.as_text()`) into instructions.

XLA prints an instruction as `%name = TYPE opcode(%operand, ...), attribute=..., ...`. Instructions form computations,
which other instructions call by name (https://openxla.org/xla/operation_semantics).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Shape(NamedTuple):
    """An array's type.

    Attributes:
      dtype: XLA's name, e.g. "bf16" or "pred".
      dims: the sizes of its axes.
      memory_space: 0 is the device's main memory (HBM on TPUs); other numbers are on-chip memories.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * bits(self.dtype) / 8


# An array, or a tuple of types.
Type = Shape | tuple["Type", ...]


def bits(dtype: str) -> int:
    """Bits per element; 0 for types that are not numbers, such as tokens."""
    if dtype == "pred":
        return 8
    found = re.search(r"\d+", dtype)  # The first number is the width: in f8e4m3fn, 4 is the exponent's.
    return int(found[0]) if found else 0


def leaves(type_: Type) -> Iterator[Shape]:
    """The arrays of a type."""
    if isinstance(type_, Shape):
        yield type_
    else:
        for child in type_:
            yield from leaves(child)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """
    Attributes:
      name: without the percent sign.
      literal: the text between the parentheses; for a constant, its value.
      attributes: the text after the parentheses.
    """

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def arrays(self) -> tuple[Shape, ...]:
        return tuple(leaves(self.type))

    def attribute(self, name: str) -> str | None:
        """The value of an attribute, if it is a word, a number or a text in braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def call_target(self) -> str:
        """The target of a custom call; "" for other instructions."""
        target = self.attribute("custom_call_target") if self.opcode == "custom-call" else None
        return target.strip('"') if target else ""

    def called(self, *names: str) -> list[str]:
        """The computations listed in the attributes of these names."""
        values = [self.attribute(name) for name in names]
        return [called for value in values if value for called in re.findall(r"%([\w.\-]+)", value)]


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(one.literal): one for one in self.instructions.values() if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction, the instructions that use it as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """
    Attributes:
      devices: the number of devices that run it together.
    """

    computations: dict[str, Computation]
    entry: Computation
    devices: int


def total_bytes(arrays: Iterable[Shape]) -> float:
    return sum(array.bytes for array in arrays)


_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def parse(text: str) -> Module:
    """
    Raises:
      ValueError: `text` is not a module.
    """
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, name, lines in _blocks(text):
        parsed = [(match, _instruction(match[2], line[match.end() :])) for match, line in lines]
        root = [instruction for match, instruction in parsed if match[1]]
        instructions = {instruction.name: instruction for _, instruction in parsed}
        computations[name] = Computation(name, instructions, root[0] if root else parsed[-1][1])
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise ValueError("not an HLO module: it has no ENTRY computation")
    header = text.partition("\n")[0]
    counts = [re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _blocks(text: str) -> Iterator[tuple[bool, str, list[tuple[re.Match, str]]]]:
    """For each computation: whether it is the entry, its name, and its instructions, each joined into one line."""
    header, lines = None, []
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif _END.fullmatch(line):
            yield bool(header[1]), header[2], [(_INSTRUCTION.match(one), one) for one in lines]
            header = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # A kernel's metadata can contain line breaks.


def _instruction(name: str, text: str) -> Instruction:
    """text: the rest of the line after `%name = `."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    type_, text = _type(text[:end]), text[end:].lstrip()
    opcode = text.partition("(")[0]
    close = _closing(text, len(opcode))
    literal = text[len(opcode) + 1 : close]
    return Instruction(
        name, type_, opcode, tuple(re.findall(r"%([\w.\-]+)", literal)), literal, text[close + 1 :].lstrip(", ")
    )


def _closing(text: str, start: int) -> int:
    """The index where the parenthesis opened at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    raise ValueError(f"not an HLO instruction: a parenthesis is not closed in {text[:80]!r}")


def _type(text: str) -> Type:
    if not text.startswith("("):
        dtype, dims, layout = _ARRAY.match(text).groups()
        space = _SPACE.search(layout or "")
        # A dynamic dimension is printed as its bound, `<=8`.
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        return Shape(dtype, sizes, int(space[1]) if space else 0)
    children, start, depth = [], 1, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (not depth and index > start):
            children.append(text[start:index].strip())
            start = index + 1
    return tuple(_type(child) for child in children if child)
