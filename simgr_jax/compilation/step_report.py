"""Compiles a config's train step and reports its memory, cost and time bounds."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import NamedTuple

import jax

from simgr_jax.compilation import train_step
from simgr_jax.compilation.cost import Cost, cost
from simgr_jax.compilation.roofline import Roofline, roofline
from simgr_jax.compilation.topology import INSTALL, Topology
from simgr_jax.compilation.train_step import PlannedRun
from simgr_jax.devices import sharding
from simgr_jax.errors import UserError

GIB = 2**30


class Memory(NamedTuple):
    """Bytes per device.

    Attributes:
      arguments: the state, the catalog and the batch; the new state reuses the old one's buffers.
      outputs: the outputs that reuse no buffer.
      temporaries: the largest total of all other arrays at any time.
      program: the compiled code.
    """

    arguments: int
    outputs: int
    temporaries: int
    program: int

    @property
    def peak(self) -> int:
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Report:
    """
    Attributes:
      mesh: the size of each axis, by name.
      seconds: the time that compilation took.
      needed: bytes per device that the step would need, if the compiler gave up because it does not fit.
      memory, cost: per device, if the step fits.
      model_flops: one device's share of `train_step.model_flops`.
    """

    topology: Topology
    mesh: dict[str, int]
    seconds: float
    needed: int | None
    memory: Memory | None
    cost: Cost | None
    model_flops: float

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def peak(self) -> int:
        """Bytes per device."""
        return self.memory.peak if self.memory else self.needed

    @property
    def times(self) -> Roofline | None:
        """None on CPUs, whose rates are unknown."""
        chip = self.topology.chip
        return roofline(self.cost, chip, self.topology.shape) if chip and self.cost else None

    def utilisation(self, seconds: float) -> float:
        """The share of the chip's peak that the model's own operations use in a step of `seconds`."""
        return self.model_flops / (seconds * self.topology.chip.flops)


def compile_step(run: PlannedRun, topology: Topology) -> Report:
    """Compiles the run's train step for the topology.

    Raises:
      UserError: the config's mesh, or its batch, does not fit the devices.
    """
    memory, needed, found = None, None, None
    with run.mesh(topology.devices):
        mesh, began = sharding.current_mesh(), time.monotonic()
        try:
            compiled = train_step.lower(run).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
        else:
            memory, found = _memory(compiled), cost(_text(compiled))
        seconds = time.monotonic() - began
    flops = train_step.model_flops(run) / len(topology.devices)
    return Report(topology, dict(mesh.shape), seconds, needed, memory, found, flops)


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology: JAX {jax.__version__} can't read the output of this libtpu version; {INSTALL}"
        ) from error


def _memory(compiled: jax.stages.Compiled) -> Memory:
    sizes = compiled.memory_analysis()
    return Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )


def needed_bytes(message: str) -> int | None:
    """The bytes named in the TPU compiler's out-of-memory error; None for any other message."""
    found = re.search(r"Ran out of memory.*?HBM.*?\(([\d.]+)([KMGT])\) exceeds", message, re.DOTALL)
    return round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def lines(report: Report) -> list[str]:
    """The report's lines for the terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    head = [f"{len(report.topology.devices)} devices, mesh {mesh}; compiled in {report.seconds:.0f} s", ""]
    if not report.fits:
        return [*head, _verdict(report)]
    return [*head, *_memory_lines(report), "", *_cost_lines(report), *_time_lines(report)]


def _verdict(report: Report) -> str:
    chip = report.topology.chip
    if chip is None:
        return f"peak {_size(report.peak)}"
    return f"peak {_size(report.peak)} of {chip.hbm_gib:g} GiB HBM: {'fits' if report.fits else 'does not fit'}"


def _memory_lines(report: Report) -> list[str]:
    parts = [f"  {name:<16}{_size(size):>14}" for name, size in report.memory._asdict().items()]
    return ["memory per device", *parts, f"  {_verdict(report)}"]


def _cost_lines(report: Report) -> list[str]:
    found, times = report.cost, report.times
    rows = ["one step, per device" + (", and its time at the chip's full rate" if times else "")]
    amounts = {
        "matrix products": _amount(found.flops, "FLOP"),
        "memory traffic": _amount(found.memory_bytes, "B"),
        "collectives": _amount(found.collective_bytes, "B"),
    }
    for (name, amount), seconds in zip(amounts.items(), times or [None] * len(amounts), strict=True):
        rows.append(f"  {name:<18}{amount:>14}" + ("" if seconds is None else f"{1000 * seconds:>14,.3f} ms"))
    for kind, (count, size) in sorted(found.collectives.items(), key=lambda item: -item[1].bytes):
        rows.append(f"    {kind:<18}{_amount(size, 'B'):>12}   in {count:,}")
    rows += [f"  not counted: {name}, {count:,} times" for name, count in found.uncounted.items()]
    return rows


def _time_lines(report: Report) -> list[str]:
    times = report.times
    if times is None:
        return []
    needed = f"utilisation counts the model's own {_amount(report.model_flops, 'FLOP')}, without recomputation"
    return [
        "",
        *(
            f"{name:<24}{1000 * seconds:>10,.2f} ms, utilisation {report.utilisation(seconds):.1%}"
            for name, seconds in (("all three at once", times.bound), ("one after the other", times.serial))
        ),
        f"({needed})",
    ]


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _amount(amount: float, unit: str) -> str:
    power = min(max(int(math.log10(amount or 1)) // 3, 0), 4)
    return f"{amount / 1000**power:,.2f} {' KMGT'[power].strip()}{unit}"
