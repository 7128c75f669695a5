"""How many parameters a model has, where, and which of them are trained."""

from __future__ import annotations

from flax import nnx
from rich.table import Table

from simgr_jax.models.lora import Frozen


def count(model: nnx.Module) -> dict[str, tuple[int, int]]:
    """(trained, frozen) parameters of each part of the model; adapters are a part of their own."""
    counts: dict[str, list[int]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, Frozen))):
        part = f"{path[0]} adapters" if "lora" in path else str(path[0])
        counts.setdefault(part, [0, 0])[isinstance(variable, Frozen)] += variable.get_value().size
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items()}


def total(model: nnx.Module) -> int:
    return sum(map(sum, count(model).values()))


def table(model: nnx.Module) -> Table:
    """For the terminal."""
    counts = count(model)
    lines = Table(box=None, pad_edge=False)
    lines.add_column("parameters")
    for column in ("trained", "frozen"):
        lines.add_column(column, justify="right")
    for part, numbers in (*counts.items(), ("total", tuple(map(sum, zip(*counts.values(), strict=True))))):
        lines.add_row(part, *(f"{number:,}" for number in numbers))
    return lines
