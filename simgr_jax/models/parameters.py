"""Counts a model's parameters by part, trained and frozen."""

from __future__ import annotations

from flax import nnx
from rich.table import Table

from simgr_jax.models.lora import Frozen
from simgr_jax.models.recommender import Recommender


def count(model: Recommender) -> dict[str, tuple[int, int]]:
    """The numbers of (trained, frozen) parameters in each part of the model; adapters are separate parts."""
    counts: dict[str, list[int]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, Frozen))):
        part = f"{path[0]} adapters" if "lora" in path else str(path[0])
        counts.setdefault(part, [0, 0])[isinstance(variable, Frozen)] += variable.get_value().size
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items()}


def total(model: Recommender) -> int:
    return sum(map(sum, count(model).values()))


def table(model: Recommender) -> Table:
    """The counts, for the terminal."""
    counts = count(model)
    lines = Table(box=None, pad_edge=False)
    lines.add_column("parameters")
    for column in ("trained", "frozen"):
        lines.add_column(column, justify="right")
    for part, numbers in (*counts.items(), ("total", tuple(map(sum, zip(*counts.values(), strict=True))))):
        lines.add_row(part, *(f"{number:,}" for number in numbers))
    return lines
