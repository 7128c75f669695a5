"""A finished run's best model, to measure more than its report has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax import nnx

from simgr_jax import run_config
from simgr_jax.comparison.rows import with_values
from simgr_jax.errors import UserError
from simgr_jax.evaluation import ranking_file
from simgr_jax.preparation import Prepared, open_mesh, prepare, restore_best


class Trained(NamedTuple):
    """
    Attributes:
      config: of the run, with the values that it was restored with.
      params: the parameters that did best on validation.
      rest: the model's other state.
    """

    workdir: Path
    config: ml_collections.ConfigDict
    prepared: Prepared
    params: nnx.State
    rest: nnx.State


def restore(workdir: Path, values: Mapping[str, Any]) -> Trained:
    """
    Args:
      values: what is not as in the run's config, by full key: how it is asked, or where the data are now.

    Raises:
      UserError: the run's files or data are not there, or the data are not those that it was judged on.
    """
    config = with_values(run_config.load(workdir), values)
    with open_mesh(config):
        prepared = prepare(config, workdir)
        params, rest, _ = restore_best(prepared, workdir)
    if not ranking_file.read(workdir / "report").is_of(prepared.split.test):
        raise UserError(f"{workdir}: was judged on other data than are there now; give those, or train it anew")
    return Trained(workdir, config, prepared, params, rest)
