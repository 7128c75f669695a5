"""Trains an LLM to recommend by scoring every item at once (SimGR, arXiv 2602.07847).

    run = simgr_jax.fit("quickstart", workdir="workdirs/quickstart")
    run.recommend([["i1", "i2"]], k=10)

`fit` trains, `load` opens what was trained, and a `Run` does the rest (docs/api.md).
"""

from __future__ import annotations

import simgr_jax.ctrl_c  # noqa: F401 (before all others)

# isort: split
import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simgr_jax.errors import UserError
    from simgr_jax.run import Run, fit, load
    from simgr_jax.serving.histories import Recommendations

__version__ = "0.2.0"
__all__ = ["Recommendations", "Run", "UserError", "fit", "load"]

# Only Transformers' tokenizers and config files are used. Without PyTorch, which nothing here needs, it would begin
# every run with a warning.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {"Recommendations": "serving.histories", "UserError": "errors"} | dict.fromkeys(("Run", "fit", "load"), "run")


def __getattr__(name: str) -> Any:
    """Imports public names only when they are asked for: they need JAX and Transformers, which take seconds."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"simgr_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'simgr_jax' has no attribute {name!r}")
