"""Writes a benchmark's figures to `results/` with everything needed to reproduce them."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections

from simgr_jax.workdir.atomic_write import write_json

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "flax", "optax", "numpy", "polars")


def write(name: str, figures: dict[str, Any], config: dict[str, Any], seed: int, without: str | None = None) -> Path:
    """Writes `results/NAME.json`: the command, seed, config, figures, versions, git commit and machine.

    without: a flag to leave out of the recorded command.
    """
    record = {
        "command": command(without),
        "seed": seed,
        "config": config,
        "figures": figures,
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit(),
        "machine": machine(),
    }
    path = ROOT / "results" / f"{name}.json"
    write_json(path, record)
    return path


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A run's config without the paths of this machine."""
    values = config.to_dict()
    del values["data"]["path"], values["cache_dir"]
    return values


def command(without: str | None = None) -> str:
    """The running command as typed at the repository's root, without the flag `without` and its value."""
    module = sys.modules["__main__"].__spec__
    if module is None:
        raise RuntimeError("the benchmark's command is unknown; run it as python -m MODULE")
    arguments = map(_relative, arguments_without(without))
    return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *arguments])


def arguments_without(flag: str | None) -> list[str]:
    """The command line's arguments without `flag`, e.g. "--only", and its value."""
    return [
        argument
        for before, argument in itertools.pairwise(sys.argv)
        if flag not in (before, argument.partition("=")[0])
    ]


def _relative(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return flag + equals + os.path.relpath(value, ROOT) if os.path.isabs(value) else argument


def commit() -> str | None:
    """The git commit, with "-dirty" if any file outside results/ has changed since; None outside a repository."""
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    head = git("rev-parse", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode
    return f"{head}-dirty" if head and changed else head or None


def machine() -> dict[str, Any]:
    """The CPU's model, the cores that this process may use, the memory in GiB, and JAX's accelerator, if any."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    description = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        if devices[0].platform != "cpu":
            description["accelerator"] = f"{len(devices)} x {devices[0].device_kind}"
    return description


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
