import itertools

import numpy as np
import pytest
import scipy.stats

from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.significance import holm, paired_difference


def compare(values, reference, **options):
    """With one case per user."""
    return paired_difference(values, reference, np.arange(len(values)), **options)


def test_p_equals_the_share_of_all_choices_of_signs():
    differences = np.array([0.5, -0.2, 0.4, 0.3, 0.1, 0.6, -0.1, 0.25, 0.35])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=9)]
    exact = np.mean(np.array(sums) >= differences.sum() - 1e-12)
    found = compare(differences, np.zeros(9), resamples=40_000)
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact / 40_000))


@pytest.mark.parametrize("gain", [0.0, 0.02, 0.05])
def test_p_agrees_with_scipy(gain):
    """On gains like those of rankings, which are mostly zero."""
    generator = np.random.default_rng(1)
    first, second = (metrics.gains(np.ceil(60 * generator.random(600) ** power), 10) for power in (1 + gain * 10, 1))
    found = compare(first, second, resamples=4999)
    reference = scipy.stats.permutation_test(
        (first, second),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=4999,
        rng=7,
    )
    assert found.p == pytest.approx(reference.pvalue, abs=0.03)
    assert found.mean == pytest.approx(reference.statistic)


def test_the_interval_is_that_of_scipys_paired_t_test():
    generator = np.random.default_rng(0)
    values = generator.normal(0.1, 1, 5000)
    found = compare(values, np.zeros(5000), resamples=99)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.ci95_low, found.ci95_high) == pytest.approx((low, high), abs=1e-4)


def test_no_difference_has_p_1():
    values = np.random.default_rng(0).random(50)
    assert compare(values, values) == (0, 0, 0, 1)


def test_a_difference_in_one_case_has_p_1():
    values = np.zeros(50)
    values[3] = 1
    assert compare(values, np.zeros(50)).p == 1


def test_a_gain_in_every_case_has_the_smallest_p():
    found = compare(np.ones(50), np.zeros(50), resamples=999)
    assert found.p == 1 / 1000


def test_swapping_the_models_only_changes_the_sign():
    first, second = np.random.default_rng(0).random((2, 40))
    there, back = compare(first, second), compare(second, first)
    assert (back.mean, back.ci95_low, back.ci95_high, back.p) == pytest.approx(
        (-there.mean, -there.ci95_high, -there.ci95_low, there.p)
    )


def test_a_true_null_hypothesis_is_rejected_at_the_nominal_rate():
    generator = np.random.default_rng(0)
    samples = generator.exponential(size=(400, 2, 30))
    rejected = np.mean([compare(*sample, resamples=199).p < 0.05 for sample in samples])
    assert rejected == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 400))


@pytest.mark.parametrize(("first", "second"), [(np.zeros(3), np.zeros(4)), (np.zeros((3, 2)), np.zeros((3, 2)))])
def test_unpaired_values_are_refused(first, second):
    with pytest.raises(ValueError, match="need the same cases of both, of two users or more"):
        compare(first, second)


def test_cases_of_one_user_count_as_one():
    """Ten equal cases of a user carry no more information than one."""
    first, second = np.random.default_rng(0).random((2, 40))
    once = compare(first, second)
    users = np.tile(np.arange(40) + 3, 10)
    assert paired_difference(np.tile(first, 10), np.tile(second, 10), users) == pytest.approx(once)


def test_users_with_more_cases_weigh_more():
    """The interval has the standard error of the delete-one jackknife over users."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(200), generator.integers(1, 9, 200))
    differences = generator.normal(size=len(users)) + generator.normal(size=200)[users]
    found = paired_difference(differences, np.zeros(len(users)), users)
    assert found.mean == pytest.approx(differences.mean())
    without = np.array([differences[users != user].mean() for user in range(200)])
    jackknife = np.sqrt(199 / 200 * np.sum((without - without.mean()) ** 2))
    half_width = (found.ci95_high - found.ci95_low) / 2
    assert half_width == pytest.approx(1.96 * jackknife, rel=0.05)
    assert half_width > 1.5 * 1.96 * differences.std() / np.sqrt(len(users))


def test_a_single_user_is_refused():
    with pytest.raises(ValueError, match="of two users or more"):
        paired_difference(np.ones(5), np.zeros(5), np.zeros(5, int))


def test_holm_on_an_example():
    """In order: .01 x 4, .03 x 3, .04 x 2 raised to the one before, and .9."""
    assert holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """Holm (1979) compares the smallest p with α / M, the next with α / (M - 1), and stops where p is larger."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        p_values = generator.random(8) ** 4
        level = generator.choice([0.01, 0.05, 0.2])
        rejected = np.zeros(8, bool)
        for place, test in enumerate(np.argsort(p_values)):
            if p_values[test] > level / (8 - place):
                break
            rejected[test] = True
        assert ((holm(p_values) <= level) == rejected).all()


def test_holm_with_no_test_and_with_one():
    assert holm([]).size == 0
    assert holm([0.3]) == [0.3]
