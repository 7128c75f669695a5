"""Measures what decoding loses of models' item distributions, and how far these are from the truth or each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from simgr_jax.data import synthetic
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.data.load import oracle_folder
from simgr_jax.errors import UserError
from simgr_jax.evaluation import distribution_error, metrics
from simgr_jax.evaluation.significance import paired_difference
from simgr_jax.ops.top_k import rank_catalog
from simgr_jax.run import Run

LENGTHS = (5, 10)  # The list lengths at which search errors are measured.


def measure(
    runs: Mapping[str, Run], *, users: int, beam_widths: Sequence[int], joint: str
) -> dict[str, dict[str, Any]]:
    """The bias figures of each run whose model has an item distribution.

    Args:
      runs: finished runs on the same data, by name.
      users: the number of test cases to measure on, evenly spread over the split.
      beam_widths: for models that have a beam.
      joint: the name of the run with whose distribution the others are also compared, if it is among the runs.

    Returns:
      By name:
      `cases`, the number of test cases that were used;
      `exact/NDCG@10` and `decoded/NDCG@10`, of the exact distribution and of the model's own lists, in these cases;
      `decoded/difference`, the second minus the first (see `evaluation.significance.Difference`);
      `search`, of those lists, and `beam`, by width, for a model with a beam: see `distribution_error.search_error`;
      `off_catalog_mass`, for a model of codes: see `distribution_error.off_catalog_mass`;
      `truth`, on embedded data, and `joint`: see `distribution_error.distance`; `calibration`, on embedded data.

    Raises:
      UserError: the joint model has no item distribution, or all cases belong to one user.
    """
    reference, figures = None, {}
    # The joint model comes first, because the others are compared with it.
    for name in sorted(runs, key=lambda name: name != joint):
        found = _measure(runs[name], users, beam_widths, reference)
        if found is None:
            if name == joint:
                raise UserError(f'--joint: "{joint}" has no distribution over items; choose another')
            continue
        figures[name], probabilities = found
        if name == joint:
            reference = probabilities
    return {name: figures[name] for name in runs if name in figures}


def _measure(
    run: Run, users: int, beam_widths: Sequence[int], joint: Float[np.ndarray, "C N"] | None
) -> tuple[dict[str, Any], Float[np.ndarray, "C N"]] | None:
    """The figures and the exact probabilities; None for a model without an item distribution."""
    model, cases = run.best_model(), run.split.test
    # Evenly spread, because files may have an order.
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(users, len(cases))).round().astype(int))
    cases = cases.take(chosen)
    if not hasattr(model, "log_probabilities"):
        return None
    if len(np.unique(cases.users)) < 2:
        raise UserError(f"--users: {users} cases belong to a single user; use more")
    with run.mesh():
        log_probabilities = run.ranker.ask(model, cases, "log_probabilities")
        figures = _decoding(run, cases, log_probabilities, beam_widths)
        if hasattr(model, "log_item_mass"):
            mass = run.ranker.ask(model, cases, "log_item_mass")
            figures["off_catalog_mass"] = distribution_error.off_catalog_mass(mass)
    if joint is not None:
        figures["joint"] = distribution_error.distance(joint, log_probabilities)
    if (oracle := oracle_folder(run.config.data, run.cache_dir)) is not None:
        truth = synthetic.oracle(oracle).next_item_probabilities(list(cases.histories))
        figures["truth"] = distribution_error.distance(truth, log_probabilities)
        figures["calibration"] = distribution_error.calibration(truth, log_probabilities)
    return figures, np.exp(log_probabilities)


def _decoding(
    run: Run, cases: EvaluationCases, log_probabilities: Float[np.ndarray, "C N"], beam_widths: Sequence[int]
) -> dict[str, Any]:
    """What the model's own lists lose, and what beams of other widths lose."""
    model, ranker = run.best_model(), run.ranker
    exact = jax.jit(rank_catalog, static_argnums=2)(log_probabilities, cases.targets, metrics.SELECTION_K)
    own = ranker.rank(model, cases, metrics.SELECTION_K)
    gains = {name: metrics.gains(found.target_rank, 10) for name, found in (("exact", exact), ("decoded", own))}
    difference = paired_difference(gains["decoded"], gains["exact"], cases.users)
    figures: dict[str, Any] = {
        "cases": len(cases),
        **{f"{name}/NDCG@10": float(found.mean()) for name, found in gains.items()},
        "decoded/difference": difference._asdict(),
        "search": _errors(log_probabilities, own.items),
    }
    if hasattr(model, "beam"):
        lists = {width: ranker.ask(model, cases, "beam", width=width)[0] for width in beam_widths}
        figures["beam"] = {str(width): _errors(log_probabilities, items) for width, items in lists.items()}
    return figures


def _errors(log_probabilities: Float[np.ndarray, "C N"], items: np.ndarray) -> dict[str, float]:
    errors = {}
    for length in LENGTHS:
        errors |= distribution_error.search_error(log_probabilities, items, length)
    return errors
