"""A compiled module's text (`compiled.as_text()`), as instructions to walk through.

XLA prints an instruction as `%name = TYPE opcode(%operand, ...), attribute=..., ...`, in computations that other
instructions call by name (https://openxla.org/xla/operation_semantics).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Shape(NamedTuple):
    """An array.

    Attributes:
      dtype: as XLA calls it: "bf16", "pred".
      dims: its axes.
      memory_space: where it lies: 0 is the device's main memory, on TPUs HBM; others are on the chip.
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
    """Of one element; 0 of what is no number, like a token."""
    if dtype == "pred":
        return 8
    found = re.search(r"\d+", dtype)  # The exponent's width in f8e4m3fn comes later.
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
      name: without its percent sign.
      literal: what stands between the parentheses, which for a constant is its value.
      attributes: the text after them.
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
        """The value of an attribute that is a word, a number or in braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def call_target(self) -> str:
        """Of a custom call, what it calls; "" of others."""
        target = self.attribute("custom_call_target") if self.opcode == "custom-call" else None
        return target.strip('"') if target else ""

    def called(self, *names: str) -> list[str]:
        """The computations that the attributes of these names give."""
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
        """Of each instruction, those that have it among their operands."""
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
      devices: that run it together.
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
    """The module that was printed as `text`.

    Raises:
      ValueError: it is no module's text.
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
        raise ValueError("no HLO module: it has no ENTRY computation")
    header = text.partition("\n")[0]
    counts = [re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _blocks(text: str) -> Iterator[tuple[bool, str, list[tuple[re.Match, str]]]]:
    """Of each computation whether it is the entry, its name, and its instructions' lines, joined where one is many."""
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
            lines[-1] += line  # A kernel's metadata has line breaks.


def _instruction(name: str, text: str) -> Instruction:
    """text: what follows `%name = `."""
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
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    raise ValueError(f"no HLO instruction: a parenthesis is not closed in {text[:80]!r}")


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
