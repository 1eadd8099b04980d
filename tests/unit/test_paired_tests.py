from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from jetway.tasks.paired_tests import drop_interval, holm, mcnemar, median_shift, samples_for


@pytest.mark.parametrize("count", [6, 7, 10, 14, 20])
def test_median_shift_has_the_p_value_of_wilcoxons_test(count):
    values = np.random.default_rng(count).normal(0.5, 1, count)
    _, _, p_value = median_shift(values)
    expected = stats.wilcoxon(values, alternative="greater", method="exact").pvalue
    assert p_value == pytest.approx(min(expected, 1 - expected), abs=1e-12)


@pytest.mark.parametrize(("count", "coverage"), [(6, 0.96875), (7, 0.953125), (10, 0.951171875)])
def test_median_shift_interval_holds_zero_for_as_many_of_all_signs_as_it_should(count, coverage):
    """Under no change every assignment of signs is as likely as any other, so coverage can be counted."""
    sizes = np.random.default_rng(0).exponential(1, count)
    held = [
        low <= 0 <= high
        for signs in product((-1, 1), repeat=count)
        for low, high in [median_shift(sizes * signs)[1]]
    ]
    assert np.mean(held) == coverage


def test_median_shift_follows_a_shift_and_a_sign():
    values = np.array([0.02, 0.05, 0.04, 0.07, 0.01, 0.03, 0.06])
    shift, (low, high), p_value = median_shift(values)
    assert (shift, low, high) == pytest.approx((0.04, 0.02, 0.06))
    mirrored = median_shift(-values)
    assert mirrored == (pytest.approx(-shift), pytest.approx((-high, -low)), p_value)


def test_one_wild_pair_of_fourteen_hardly_moves_the_interval():
    calm = 0.01 * np.linspace(-1, 1, 13)
    shift, (low, high), _ = median_shift(np.array([*calm, 5.0]))
    assert -0.01 < low < 0 < shift < high < 0.01


def test_fewer_than_six_pairs_have_no_interval():
    assert median_shift(np.array([0.1] * 5))[1] is None


def test_pairs_without_any_difference_show_none():
    assert median_shift(np.zeros(10)) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (9, 3), (3, 9), (60, 40), (400, 300)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    fewer = min(lost, won)
    assert mcnemar(lost, won) == pytest.approx(stats.binom.cdf(fewer, lost + won, 0.5), rel=1e-9)


def test_drop_interval_ends_where_the_score_is_two_standard_errors():
    """The root of Tango's equation, whose nuisance share is found here by a grid instead of in closed form."""
    lost, won, count = 9, 3, 32
    for drop in drop_interval(lost, won, count):
        shares = np.linspace(max(0.0, -drop) + 1e-9, (1 - abs(drop)) / 2 + max(0.0, -drop), 200_001)
        likelihood = (
            won * np.log(shares)
            + lost * np.log(shares + drop)
            + (count - lost - won) * np.log(np.clip(1 - 2 * shares - drop, 1e-12, None))
        )
        won_ratio = shares[likelihood.argmax()]
        error = np.sqrt(count * (2 * won_ratio + drop * (1 - drop)))
        assert abs(lost - won - count * drop) / error == pytest.approx(1.95996, abs=1e-3)


def test_drop_interval_without_a_difference_leaves_what_so_few_samples_can_miss():
    critical = NormalDist().inv_cdf(0.975) ** 2
    assert drop_interval(0, 0, 100) == pytest.approx(
        (-critical / (100 + critical), critical / (100 + critical))
    )


@pytest.mark.parametrize(("drop", "discordant"), [(0.0, 0.05), (0.01, 0.05), (0.02, 0.02)])
def test_drop_interval_holds_the_truth_about_as_often_as_it_says(drop, discordant):
    rng = np.random.default_rng(3)
    shares = [(discordant + drop) / 2, (discordant - drop) / 2, 1 - discordant]
    draws = rng.multinomial(1000, shares, size=2000)
    held = [low <= drop <= high for lost, won, _ in draws for low, high in [drop_interval(lost, won, 1000)]]
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize(
    ("margin", "discordant", "samples"),
    [(0.01, 0.05, 4279), (0.01, 0.10, 8561), (0.005, 0.05, 17124), (0.005, 0.10, 34252), (0.02, 0.05, 1067)],
)
def test_samples_for_agrees_with_connors_formula(margin, discordant, samples):
    assert samples_for(margin, discordant, power=0.90, alpha=0.05) == pytest.approx(samples, abs=1)


def test_samples_for_few_discordant_samples_are_those_of_twice_the_margin():
    assert samples_for(0.01, 0.0) == samples_for(0.01, 0.02)


@pytest.mark.parametrize(("margin", "discordant"), [(0.0, 0.1), (1.0, 0.1), (0.01, 1.5)])
def test_samples_for_refuses_what_is_no_share(margin, discordant):
    with pytest.raises(ValueError, match="no share"):
        samples_for(margin, discordant)


def test_holm_is_as_published():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
