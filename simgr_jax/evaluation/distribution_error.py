"""Measures how far a model's lists are from its item distribution, and how far that distribution is from the truth.

There are two errors. The *search* error is what decoding loses of the model's exact distribution p(i | u), because a
beam prunes items. The *model* error is how far that distribution is from the truth, or from another model's.

All functions take log-probabilities over the whole catalog, one row for each of C histories. The probabilities of a row
sum to 1.
"""

from __future__ import annotations

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

# Edges of the calibration bins of predicted probability, as multiples of 1 / N.
_CALIBRATION_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def search_error(
    log_probabilities: Float[np.ndarray, "C N"], items: Int[np.ndarray, "C K"], k: int
) -> dict[str, float]:
    """Compares the lists that a search found with the exact top k.

    Args:
      log_probabilities: the model's exact ones.
      items: the search's lists, best first; -1 fills a shorter list.
      k: only the first k items of a list count.

    Returns:
      Means over histories: `found@k`, the share of the exact top k that is listed; `mass@k`, the probability of the
      listed items divided by that of the exact top k; `rank_correlation@k`, Spearman's correlation between the exact
      ranks of the exact top k and their ranks in the list, where all missing items share the last rank.
    """
    listed = items[:, :k]
    probabilities = np.exp(log_probabilities.astype(np.float64))
    exact = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    is_same = exact[:, :, None] == listed[:, None, :]
    is_found = is_same.any(axis=2)
    listed_mass = np.where(listed >= 0, np.take_along_axis(probabilities, np.maximum(listed, 0), axis=1), 0).sum(axis=1)
    exact_mass = np.take_along_axis(probabilities, exact, axis=1).sum(axis=1)
    ranks = np.where(is_found, is_same.argmax(axis=2), k)
    return {
        f"found@{k}": float(is_found.mean()),
        f"mass@{k}": float((listed_mass / exact_mass).mean()),
        f"rank_correlation@{k}": float(np.mean([_spearman(row) for row in ranks])),
    }


def _spearman(ranks: Int[np.ndarray, " K"]) -> float:
    """The correlation of ranks with 0, 1, 2, ...; 0 if all are tied (nothing was found)."""
    if np.ptp(ranks) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(np.arange(len(ranks)), ranks).statistic)


def off_catalog_mass(log_item_mass: Float[np.ndarray, " C"]) -> float:
    """The mean probability that a model of codes gives to code tuples of no item.

    Args:
      log_item_mass: log of the probability of the catalog's code tuples, before renormalization.
    """
    return float(-np.expm1(np.asarray(log_item_mass, np.float64)).mean())


def distance(truth: Float[np.ndarray, "C N"], log_probabilities: Float[np.ndarray, "C N"]) -> dict[str, float]:
    """How far a model's distribution is from a reference: the truth if it is known, or another model's.

    Args:
      truth: probabilities of the reference.
      log_probabilities: the model's.

    Returns:
      `kl`, the mean of KL(truth || model) in nats; `total_variation`, the mean of half the sum of absolute differences,
      in [0, 1]; `calibration_error`, the share of probability in the wrong bin, in [0, 1]. For this the items of all
      histories are binned by the model's probability, and the error is half the sum over bins of |model's mass - true
      mass|. It is at most the total variation, and 0 for a model whose probabilities are right on average.
    """
    truth = truth.astype(np.float64)
    log_probabilities = log_probabilities.astype(np.float64)
    probabilities = np.exp(log_probabilities)
    log_truth = np.log(truth, where=truth > 0, out=np.zeros_like(truth))
    kl = np.sum(np.where(truth > 0, truth * (log_truth - log_probabilities), 0), axis=1)
    bins = calibration(truth, log_probabilities)
    return {
        "kl": float(kl.mean()),
        "total_variation": float(np.abs(truth - probabilities).sum(axis=1).mean() / 2),
        "calibration_error": float(sum(abs(row["predicted"] - row["true"]) for row in bins) / 2),
    }


def calibration(truth: Float[np.ndarray, "C N"], log_probabilities: Float[np.ndarray, "C N"]) -> list[dict[str, float]]:
    """The mass that a model and the truth give to the items in each bin of the model's probability.

    Returns:
      For each bin that has items: `from` and `to`, its edges as probabilities; `predicted` and `true`, the mean mass of
      a history's items in it.
    """
    num_histories, num_items = truth.shape
    probabilities = np.exp(log_probabilities.astype(np.float64))
    edges = np.array(_CALIBRATION_EDGES) / num_items
    bins = np.digitize(probabilities, edges).reshape(-1)
    counts, predicted, true = (
        np.bincount(bins, weights, minlength=len(edges) + 1)
        for weights in (None, probabilities.reshape(-1), truth.reshape(-1))
    )
    # In a small catalog the last edges are above 1, and no item is above them.
    bounds = [0.0, *np.minimum(edges, 1.0).tolist(), 1.0]
    return [
        {
            "from": bounds[index],
            "to": bounds[index + 1],
            "predicted": float(predicted[index] / num_histories),
            "true": float(true[index] / num_histories),
        }
        for index in np.flatnonzero(counts)
    ]
