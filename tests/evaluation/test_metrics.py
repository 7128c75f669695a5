import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.evaluation import metrics


def brute_force(scores, targets, ks=(1, 5, 10)):
    """The definitions, one case at a time. A tied target has the mean of the ranks that the ties share."""
    ranks, lists = [], []
    for row, target in zip(scores.tolist(), targets, strict=True):
        better = sum(s > row[target] for s in row)
        tied = sum(s == row[target] for s in row)
        ranks.append(sum(range(better + 1, better + tied + 1)) / tied)
        lists.append(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[: max(ks)])
    expected = {}
    for k in ks:
        expected[f"HR@{k}"] = sum(r <= k for r in ranks) / len(ranks)
    for k in set(ks) - {1}:
        expected[f"NDCG@{k}"] = sum(1 / math.log2(1 + r) for r in ranks if r <= k) / len(ranks)
    slots = [i for line in lists for i in line[:10]]
    shares = [slots.count(i) / len(slots) for i in set(slots)]
    expected["entropy@10"] = -sum(p * math.log(p) for p in shares)
    expected["coverage@10"] = len(set(slots)) / scores.shape[1]
    return np.array(ranks), np.array(lists), expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cases=st.integers(1, 12),
    num_items=st.integers(20, 40),
    levels=st.integers(1, 9),
    ks=st.sampled_from([(1, 5, 10), (10,), (3, 10), (20, 10, 1)]),
)
def test_metrics_agree_with_brute_force_under_ties(seed, cases, num_items, levels, ks):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, size=(cases, num_items))
    targets = generator.integers(0, num_items, size=cases)
    ranks, items, expected = brute_force(scores, targets, ks)
    found = metrics.summarize(ranks, items, num_items, ks)
    assert found == pytest.approx(expected, abs=1e-12)
    assert list(found) == metrics.names(ks)


def test_hand_made_example():
    ranks = np.array([1, 2.5, 7, np.inf])
    items = np.full((4, 10), -1)
    items[0, 0], items[1, :2], items[2, 0] = 3, [3, 5], 4
    result = metrics.summarize(ranks, items, num_items=8)
    assert result == pytest.approx(
        {
            "HR@1": 0.25,
            "HR@5": 0.5,
            "HR@10": 0.75,
            "NDCG@5": (1 + 1 / math.log2(3.5)) / 4,
            "NDCG@10": (1 + 1 / math.log2(3.5) + 1 / 3) / 4,
            "entropy@10": -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)),
            "coverage@10": 3 / 8,
        }
    )
    assert list(result) == metrics.names()
    assert all(type(value) is float for value in result.values())


def test_every_item_shown_equally_often_has_the_entropy_of_the_whole_catalog():
    items = (np.arange(30)[:, None] + np.arange(10)) % 30
    result = metrics.summarize(np.ones(30), items, num_items=30)
    assert result["entropy@10"] == pytest.approx(math.log(30))
    assert result["coverage@10"] == 1


def test_one_list_for_all_has_the_entropy_of_ten_items():
    result = metrics.summarize(np.ones(7), np.tile(np.arange(10), (7, 1)), num_items=1000)
    assert result["entropy@10"] == pytest.approx(math.log(10))
    assert result["coverage@10"] == 0.01


def lists_from(popularity, cases, seed=0):
    """Top-10 lists of different items, drawn by `popularity`."""
    noise = np.random.default_rng(seed).gumbel(size=(cases, len(popularity)))
    return np.argsort(-(np.log(popularity) + noise), axis=1)[:, :10]


def targets_of(num_items, cases):
    """Few items are bought often, most of them seldom."""
    popularity = 1 / np.arange(1, num_items + 1)
    return np.random.default_rng(1).choice(num_items, cases, p=popularity / popularity.sum())


def test_lists_that_are_nearly_the_same_for_all_are_those_of_a_popularity_ranker():
    """The same ten items for all, and a run whose lists had 28 of 2,806 items (coverage .01)."""
    targets = targets_of(2806, 1500)
    assert metrics.shows_everybody_the_same(np.tile(np.arange(10), (1500, 1)), targets, 2806)
    few = np.array([1.0] * 10 + [0.002] * 18 + [1e-12] * 2778)
    items = lists_from(few, 1500)
    assert metrics.summarize(np.ones(1500), items, 2806)["coverage@10"] == pytest.approx(0.01, abs=0.001)
    assert metrics.shows_everybody_the_same(items, targets, 2806)


def test_lists_of_a_model_that_learns_are_not():
    """A slow run after its first epoch had an effective number of 28 items, others have hundreds."""
    targets = targets_of(3541, 3285)
    for effective in (28, 60, 600):
        items = lists_from(np.array([1.0] * effective + [1e-9] * (3541 - effective)), 3285)
        assert not metrics.shows_everybody_the_same(items, targets, 3541)


def test_equal_lists_are_right_where_all_buy_the_same_and_usual_where_there_is_little_to_choose():
    same = np.tile(np.arange(10), (1500, 1))
    assert not metrics.shows_everybody_the_same(same, np.arange(1500) % 40, 2806)
    assert not metrics.shows_everybody_the_same(same, np.arange(1500) % 60, 60)


def test_only_the_top_ten_of_a_longer_list_count():
    items = np.tile(np.arange(20), (3, 1))
    ranks = np.array([10, 10.5, 11])
    assert metrics.summarize(ranks, items, 20) == metrics.summarize(ranks, items[:, :10], 20)
    assert metrics.summarize(ranks, items, 20)["HR@10"] == pytest.approx(1 / 3)


def test_recommending_nothing_scores_zero():
    result = metrics.summarize(np.full(5, np.inf), np.full((5, 10), -1), num_items=20)
    assert set(result.values()) == {0.0}


ALONE = np.arange(2000)  # One case per user.


@pytest.fixture(scope="module")
def many_cases():
    """2,000 cases with an HR@10 of about 0.2, and lists drawn from a long-tailed catalog of 500 items."""
    generator = np.random.default_rng(0)
    ranks = np.ceil(generator.pareto(0.6, size=2000) * 15 + 1e-9)
    popularity = np.arange(1, 501) ** -2.0
    keys = generator.gumbel(size=(2000, 500)) + np.log(popularity)
    return ranks, np.argsort(-keys, axis=1)[:, :10], popularity


def test_interval_of_hit_rate_has_the_width_of_a_binomial(many_cases):
    ranks, items, _ = many_cases
    estimate = metrics.summarize(ranks, items, 500)["HR@10"]
    interval = metrics.confidence_intervals(ranks, items, 500, ALONE)
    half_width = (interval["HR@10/ci95_high"] - interval["HR@10/ci95_low"]) / 2
    assert 0.1 < estimate < 0.9
    assert half_width == pytest.approx(1.96 * math.sqrt(estimate * (1 - estimate) / 2000), rel=0.1)


def test_intervals_contain_their_estimate_and_are_the_same_each_time(many_cases):
    ranks, items, _ = many_cases
    interval = metrics.confidence_intervals(ranks, items, 500, ALONE)
    for name, estimate in metrics.summarize(ranks, items, 500).items():
        assert interval[f"{name}/ci95_low"] < estimate < interval[f"{name}/ci95_high"]
    assert interval == metrics.confidence_intervals(ranks, items, 500, ALONE)


def test_resamples_depend_on_the_seed_alone(many_cases):
    ranks, items, _ = many_cases
    first, again, in_other_chunks, other = (
        metrics.resample(ranks, items, 500, ALONE, resamples=20, **options)
        for options in ({}, {}, {"chunk": 7}, {"seed": 1})
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, in_other_chunks, rtol=1e-12)
    assert (first != other).any(axis=1).all()


def test_intervals_are_for_the_ks_that_are_asked_for(many_cases):
    ranks, items, _ = many_cases
    interval = metrics.confidence_intervals(ranks, items, 500, ALONE, ks=(3, 10))
    expected = {f"{name}/ci95_{end}" for name in metrics.names((3, 10)) for end in ("low", "high")}
    assert set(interval) == expected


def test_spread_of_entropy_and_coverage_is_that_of_fresh_users(many_cases):
    """Fresh samples of users from the same population vary as much as the intervals say."""
    ranks, items, popularity = many_cases
    generator = np.random.default_rng(1)
    fresh = []
    for _ in range(60):
        keys = generator.gumbel(size=(2000, 500)) + np.log(popularity)
        fresh.append(metrics.summarize(ranks, np.argpartition(-keys, 10, axis=1)[:, :10], 500))
    interval = metrics.confidence_intervals(ranks, items, 500, ALONE)
    for name, tolerance in (("entropy@10", 1.35), ("coverage@10", 2)):
        deviation = np.std([m[name] for m in fresh])
        half_width = (interval[f"{name}/ci95_high"] - interval[f"{name}/ci95_low"]) / 2
        assert 1 / tolerance < half_width / (1.96 * deviation) < tolerance


def test_a_resample_counts_each_drawn_case_as_often_as_it_is_drawn():
    """The sparse product equals `summarize` of the drawn cases."""
    generator = np.random.default_rng(2)
    ranks = generator.integers(1, 20, size=13).astype(float)
    items = np.stack([generator.permutation(30)[:10] for _ in range(13)])
    items[3, 6:] = -1
    resampled = metrics.resample(ranks, items, 30, ALONE[:13], resamples=3, seed=5, chunk=3)
    draws = np.random.default_rng(5).integers(0, 13, size=(3, 13))
    for draw, row in zip(draws, resampled, strict=True):
        assert metrics.summarize(ranks[draw], items[draw], 30) == pytest.approx(
            dict(zip(metrics.names(), row, strict=True))
        )


def test_a_users_cases_are_drawn_together():
    generator = np.random.default_rng(2)
    ranks = generator.integers(1, 20, size=13).astype(float)
    items = np.stack([generator.permutation(30)[:10] for _ in range(13)])
    users = np.array([7, 7, 2, 2, 2, 9, 9, 9, 9, 4, 7, 2, 9])
    resampled = metrics.resample(ranks, items, 30, users, resamples=3, seed=5)
    draws = np.random.default_rng(5).integers(0, 4, size=(3, 4))
    for draw, row in zip(draws, resampled, strict=True):
        cases = np.concatenate([np.flatnonzero(users == np.array([2, 4, 7, 9])[user]) for user in draw])
        assert metrics.summarize(ranks[cases], items[cases], 30) == pytest.approx(
            dict(zip(metrics.names(), row, strict=True))
        )


def test_intervals_stay_within_the_bounds_of_the_metric():
    interval = metrics.confidence_intervals(np.array([1.0, 1.0, 30.0]), np.tile(np.arange(10), (3, 1)), 10, ALONE[:3])
    assert all(value >= 0 for value in interval.values())
    assert interval["HR@10/ci95_high"] == 1
    assert interval["entropy@10/ci95_high"] <= math.log(10)


@pytest.mark.parametrize(
    ("ranks", "items"),
    [
        (np.ones(0), np.zeros((0, 10), int)),
        (np.ones(3), np.zeros((2, 10), int)),
        (np.ones(2), np.zeros((2, 9), int)),
        (np.zeros(2), np.zeros((2, 10), int)),
        (np.array([1, np.nan]), np.zeros((2, 10), int)),
        (np.ones(2), np.full((2, 10), 20)),
        (np.ones(2), np.full((2, 10), -2)),
    ],
)
def test_impossible_arrays_are_refused(ranks, items):
    with pytest.raises(ValueError):
        metrics.summarize(ranks, items, num_items=20)


def test_lists_shorter_than_the_largest_k_are_refused():
    with pytest.raises(ValueError, match="K >= 20"):
        metrics.summarize(np.ones(2), np.zeros((2, 10), int), 20, ks=(10, 20))
