import numpy as np
import pytest

from jetway.tasks.change_points import MIN_NIGHTS, change_points, levels

TRIALS, NOISE = 400, 0.02


def found(nights, make, seed=0):
    """The change points of many series of so many nights."""
    rng = np.random.default_rng(seed)
    return [[point.index for point in change_points(make(rng, nights))] for _ in range(TRIALS)]


def noise(rng, nights):
    return 1 + NOISE * rng.standard_normal(nights)


def shifted(share):
    """Another level from the middle on."""
    return lambda rng, nights: noise(rng, nights) * np.where(np.arange(nights) < nights // 2, 1, 1 + share)


def heavy_tails(rng, nights):
    return 1 + NOISE * rng.standard_t(3, nights)


@pytest.mark.parametrize(("nights", "make"), [(20, noise), (60, noise), (60, heavy_tails)])
def test_seldom_a_point_where_nothing_moved(nights, make):
    assert np.mean([bool(points) for points in found(nights, make)]) <= 0.04


@pytest.mark.parametrize(
    ("nights", "share", "least"), [(60, 0.05, 0.95), (60, 0.03, 0.7), (20, 0.05, 0.8), (60, -0.05, 0.95)]
)
def test_a_planted_shift_is_found_within_two_nights(nights, share, least):
    near = [
        any(abs(index - nights // 2) <= 2 for index in points) for points in found(nights, shifted(share))
    ]
    assert np.mean(near) >= least


def test_up_and_down_again_are_two_points_with_the_levels_between_them():
    rng = np.random.default_rng(1)
    series = noise(rng, 60)
    series[20:40] *= 1.1
    first, second = change_points(series)
    assert (first.index, second.index) == (20, 40)
    assert first.change_ratio == pytest.approx(0.1, abs=0.02)
    assert second.after == pytest.approx(1.0, abs=0.02)
    assert levels(60, [first, second]) == [(0, 20), (20, 40), (40, 60)]


def test_two_odd_nights_are_no_new_level():
    series = noise(np.random.default_rng(2), 40)
    series[20 : 20 + MIN_NIGHTS - 1] *= 1.5
    assert change_points(series) == []


def test_figures_without_noise_differ_or_do_not():
    assert change_points([7.0] * 30) == []
    (point,) = change_points([7.0] * 10 + [8.0] * 5)
    assert (point.index, point.before, point.after, point.p_value) == (10, 7.0, 8.0, 0.0)
    (risen,) = change_points([0.0] * 5 + [1.0] * 5)
    assert risen.change_ratio == np.inf


@pytest.mark.parametrize("nights", range(2 * MIN_NIGHTS))
def test_too_few_nights_have_no_point(nights):
    assert change_points([float(index >= nights // 2) for index in range(nights)]) == []
