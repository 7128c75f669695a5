import itertools

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.evaluation import distribution_error


def distributions(seed, cases=6, items=20):
    return scipy.special.log_softmax(np.random.default_rng(seed).normal(0, 2, (cases, items)), axis=1)


@given(seed=st.integers(0, 1000), k=st.integers(2, 10))
def test_the_exact_lists_have_no_search_error(seed, k):
    exact = distributions(seed)
    error = distribution_error.search_error(exact, np.argsort(-exact, axis=1), k)
    assert error == pytest.approx({f"found@{k}": 1.0, f"mass@{k}": 1.0, f"rank_correlation@{k}": 1.0})


@settings(max_examples=25)
@given(seed=st.integers(0, 1000))
def test_search_error_agrees_with_its_definition(seed):
    generator = np.random.default_rng(seed)
    exact, k = distributions(seed), 5
    lists = np.stack([generator.permutation(20)[:7] for _ in exact])
    lists[0, 3:] = -1
    found, mass, correlation = [], [], []
    for log_probabilities, listed in zip(exact, lists, strict=True):
        p = np.exp(log_probabilities)
        best = sorted(range(20), key=lambda item, p=p: -p[item])[:k]
        kept = [item for item in listed.tolist()[:k] if item >= 0]
        found.append(len(set(best) & set(kept)) / k)
        mass.append(sum(p[item] for item in kept) / sum(p[item] for item in best))
        ranks = [kept.index(item) if item in kept else k for item in best]
        correlation.append(scipy.stats.spearmanr(range(k), ranks).statistic if len(set(ranks)) > 1 else 0)
    expected = [np.mean(found), np.mean(mass), np.mean(correlation)]
    np.testing.assert_allclose(list(distribution_error.search_error(exact, lists, k).values()), expected)


def test_an_empty_list_finds_nothing():
    error = distribution_error.search_error(distributions(0), np.full((6, 10), -1), 10)
    assert error == {"found@10": 0, "mass@10": 0, "rank_correlation@10": 0}


def test_off_catalog_mass_of_independent_heads():
    """Two heads with two codes each, and three items. The fourth tuple is off the catalog."""
    heads = np.array([[0.9, 0.1], [0.3, 0.7]])
    items = [(0, 0), (0, 1), (1, 0)]
    log_mass = np.log(sum(heads[0, a] * heads[1, b] for a, b in items))
    assert distribution_error.off_catalog_mass(np.array([log_mass, 0.0])) == pytest.approx(0.1 * 0.7 / 2)


def test_a_distribution_has_no_distance_from_itself():
    log_probabilities = distributions(1)
    found = distribution_error.distance(np.exp(log_probabilities), log_probabilities)
    assert found == pytest.approx({"kl": 0, "total_variation": 0, "calibration_error": 0}, abs=1e-12)


@given(seed=st.integers(0, 1000))
def test_distances_are_scipys(seed):
    truth, model = np.exp(distributions(seed)), distributions(seed + 1)
    truth[0] = np.eye(20)[3]  # Items of probability 0 add nothing to KL.
    found = distribution_error.distance(truth, model)
    assert found["kl"] == pytest.approx(np.mean(scipy.stats.entropy(truth, np.exp(model), axis=1)))
    variation = [max(sum(t[list(s)]) - sum(m[list(s)]) for s in _best_sets(t, m)) for t, m in _rows(truth, model)]
    assert found["total_variation"] == pytest.approx(np.mean(variation))
    assert 0 <= found["calibration_error"] <= found["total_variation"] + 1e-12


def _rows(truth, model):
    return zip(truth, np.exp(model), strict=True)


def _best_sets(truth, model):
    """The sets of items among which one has the largest difference in probability, which is the total variation."""
    order = np.argsort(model - truth)
    return itertools.accumulate([[item] for item in order])


def test_a_model_that_is_right_on_average_is_calibrated_but_wrong_for_each_user():
    """Its probabilities are right on average over users, but not for each of them."""
    likely = np.array([0.4, 0.4, 0.1, 0.1])
    model = np.log(np.stack([likely, likely]))
    truth = np.array([[0.8, 0.0, 0.2, 0.0], [0.0, 0.8, 0.0, 0.2]])
    found = distribution_error.distance(truth, model)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-12)
    assert found["total_variation"] == pytest.approx(0.5)


def test_calibration_bins_hold_all_mass():
    truth, model = np.exp(distributions(3)), distributions(4)
    rows = distribution_error.calibration(truth, model)
    assert sum(row["predicted"] for row in rows) == pytest.approx(1)
    assert sum(row["true"] for row in rows) == pytest.approx(1)
    assert all(low["to"] <= high["from"] for low, high in itertools.pairwise(rows))
    assert all(0 <= row["from"] <= row["to"] <= 1 for row in rows)
