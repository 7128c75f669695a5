"""What decoding loses of trained models' item distributions, and how far they are from each other and the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from simgr_jax.comparison.trained import Trained, restore
from simgr_jax.data import synthetic
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.data.load import oracle_folder
from simgr_jax.errors import UserError
from simgr_jax.evaluation import bias, metrics
from simgr_jax.evaluation.significance import paired_difference
from simgr_jax.models.recommender import Recommender
from simgr_jax.ops.top_k import rank_catalog
from simgr_jax.preparation import cache_dir, open_mesh

LENGTHS = (5, 10)  # Of the lists that search errors are measured for.


class _Asked(NamedTuple):
    """A finished run's best model, and the users that it is asked about."""

    trained: Trained
    cases: EvaluationCases

    @property
    def model(self) -> Recommender:
        return self.trained.prepared.model

    def ask(self, question: str, **options: Any) -> Any:
        trained = self.trained
        return trained.prepared.ranker.ask(question, trained.params, trained.rest, self.cases, **options)


def measure(
    workdirs: Mapping[str, Path],
    places: Mapping[str, str],
    *,
    users: int,
    batch_size: int,
    beam_widths: Sequence[int],
    joint: str,
) -> dict[str, dict[str, Any]]:
    """The bias figures of each run whose model has an item distribution.

    Args:
      workdirs: of finished runs on the same data, by name.
      places: what is not where the runs' configs have it, by full key.
      users: how many of the test split are asked about; evenly spread over it.
      batch_size: users at once.
      beam_widths: of those models that have a beam.
      joint: the name of the run that the others' distributions are measured from, too, if it is there.

    Returns:
      By name:
      `cases`, how many test cases were asked about;
      `exact/NDCG@10` and `decoded/NDCG@10`, of the exact distribution and of the model's own lists, in these cases, and
      `decoded/difference`, the second less the first (see `evaluation.significance.Difference`);
      `search`, of those lists, and `beam`, by width, of a model that has a beam: see `evaluation.bias.search_error`;
      `off_catalog_mass`, of a model of codes: see `evaluation.bias.off_catalog_mass`;
      `truth`, on embedded data, and `joint`: see `evaluation.bias.distance`; `calibration`, on embedded data.

    Raises:
      UserError: the joint model has no item distribution, or all cases are one user's.
    """
    # An item of the history may be listed: what a model says of it is part of its distribution.
    values = {**places, "evaluation.batch_size": batch_size, "evaluation.filter_history": False}
    reference, figures = None, {}
    # The one that others are measured from comes first.
    for name in sorted(workdirs, key=lambda name: name != joint):
        found = _measure(workdirs[name], values, users, beam_widths, reference)
        if found is None:
            if name == joint:
                raise UserError(f'--joint: "{joint}" has no distribution over items; choose another')
            continue
        figures[name], probabilities = found
        if name == joint:
            reference = probabilities
    return {name: figures[name] for name in workdirs if name in figures}


def _measure(
    workdir: Path,
    values: Mapping[str, Any],
    users: int,
    beam_widths: Sequence[int],
    joint: Float[np.ndarray, "C N"] | None,
) -> tuple[dict[str, Any], Float[np.ndarray, "C N"]] | None:
    """The figures and the exact probabilities; None of a model that has none."""
    trained = restore(workdir, values)
    cases = trained.prepared.split.test
    # Evenly spread: files may have an order.
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(users, len(cases))).round().astype(int))
    asked = _Asked(trained, cases.take(chosen))
    if not hasattr(asked.model, "log_probabilities"):
        return None
    if len(np.unique(asked.cases.users)) < 2:
        raise UserError(f"--users: {users} cases are of one user; ask for more")
    with open_mesh(trained.config):
        log_probabilities = asked.ask("log_probabilities")
        figures = _decoding(asked, log_probabilities, beam_widths)
        if hasattr(asked.model, "log_item_mass"):
            figures["off_catalog_mass"] = bias.off_catalog_mass(asked.ask("log_item_mass"))
    if joint is not None:
        figures["joint"] = bias.distance(joint, log_probabilities)
    if (oracle := oracle_folder(trained.config.data, cache_dir(trained.config, workdir))) is not None:
        truth = synthetic.oracle(oracle).next_item_probabilities(list(asked.cases.histories))
        figures["truth"] = bias.distance(truth, log_probabilities)
        figures["calibration"] = bias.calibration(truth, log_probabilities)
    return figures, np.exp(log_probabilities)


def _decoding(asked: _Asked, log_probabilities: Float[np.ndarray, "C N"], beam_widths: Sequence[int]) -> dict[str, Any]:
    """What the model's own lists lose, and those of beams of other widths."""
    exact = jax.jit(rank_catalog, static_argnums=2)(log_probabilities, asked.cases.targets, metrics.LIST_LENGTH)
    trained = asked.trained
    own = trained.prepared.ranker(trained.params, trained.rest, asked.cases)
    gains = {name: metrics.gains(found.target_rank, 10) for name, found in (("exact", exact), ("decoded", own))}
    difference = paired_difference(gains["decoded"], gains["exact"], asked.cases.users)
    figures: dict[str, Any] = {
        "cases": len(asked.cases),
        **{f"{name}/NDCG@10": float(found.mean()) for name, found in gains.items()},
        "decoded/difference": difference._asdict(),
        "search": _errors(log_probabilities, own.items),
    }
    if hasattr(asked.model, "beam"):
        lists = {width: asked.ask("beam", width=width)[0] for width in beam_widths}
        figures["beam"] = {str(width): _errors(log_probabilities, items) for width, items in lists.items()}
    return figures


def _errors(log_probabilities: Float[np.ndarray, "C N"], items: np.ndarray) -> dict[str, float]:
    errors = {}
    for length in LENGTHS:
        errors |= bias.search_error(log_probabilities, items, length)
    return errors
