import numpy as np
import pytest

from jetway.tasks.paired_tests import samples_for
from jetway.tasks.verdict import (
    FALSE_ALARM_RATIO,
    LOOKS,
    Change,
    correctness_evidence,
    judge,
    overall,
    remaining_alpha,
    score_evidence,
    timing_evidence,
)

TRIALS = 1000
PAIR_NOISE = 0.02  # of a pair's log ratio, as between 2 s processes on a shared machine


def noise_of(kind, rng, shape):
    """Log latencies of runs in their order in time, without any change."""
    spread = PAIR_NOISE / np.sqrt(2)
    steady, runs = rng.normal(0, spread, shape), np.arange(shape[1])
    disturbances = {
        "steady": 0.0,
        "heavy tails": 0.6 * spread * rng.standard_t(2, shape),
        "outliers": (rng.random(shape) < 0.05) * rng.exponential(0.2, shape),
        "drift": 0.01 * runs,
        "walk": np.cumsum(rng.normal(0, PAIR_NOISE / 2, shape), axis=1),
        "step": 0.1 * (runs >= rng.integers(0, shape[1], (shape[0], 1))),
    }
    return disturbances[kind] if kind == "heavy tails" else steady + disturbances[kind]


def final_verdicts(kind, slowdown, seed=0):
    """Verdict of each simulated session: pairs in drawn order, looked at as a session looks at them."""
    rng = np.random.default_rng(seed)
    pairs = noise_of(kind, rng, (TRIALS, 2 * max(LOOKS))).reshape(TRIALS, -1, 2)
    order = rng.random(pairs.shape).argsort(axis=2)
    baseline, candidate = np.moveaxis(np.exp(np.take_along_axis(pairs, order, axis=2)), 2, 0)
    return [
        session_verdict(before, after)
        for before, after in zip(baseline, (1 + slowdown) * candidate, strict=True)
    ]


def session_verdict(baseline, candidate):
    for look, alpha in LOOKS.items():
        evidence = timing_evidence(baseline[:look], candidate[:look])
        verdict = judge({"latency_ms_p50": evidence}, alpha=alpha)["latency_ms_p50"]
        if verdict.change is not Change.UNKNOWN:
            break
    return verdict


def share(verdicts, change, runs=20):
    return np.mean([verdict.change is change and verdict.count <= runs for verdict in verdicts])


def coverage(verdicts, slowdown):
    return np.mean([verdict.interval[0] <= slowdown <= verdict.interval[1] for verdict in verdicts])


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("steady", 0.99),
        ("heavy tails", 0.98),
        ("outliers", 0.9),
        ("drift", 0.99),
        ("walk", 0.99),
        ("step", 0.99),
    ],
)
def test_no_alarm_where_nothing_changed(kind, same):
    verdicts = final_verdicts(kind, 0.0)
    assert share(verdicts, Change.REGRESSED) <= FALSE_ALARM_RATIO
    assert share(verdicts, Change.IMPROVED) <= FALSE_ALARM_RATIO
    assert share(verdicts, Change.SAME) >= same
    assert 0.93 <= coverage(verdicts, 0.0) <= 0.97


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("steady", 0.99),
        ("heavy tails", 0.85),
        ("outliers", 0.7),
        ("drift", 0.98),
        ("walk", 0.98),
        ("step", 0.88),
    ],
)
def test_slowdown_of_5_percent_is_found_within_ten_runs_a_side(kind, found):
    verdicts = final_verdicts(kind, 0.05)
    assert share(verdicts, Change.REGRESSED, runs=10) >= found
    assert share(verdicts, Change.SAME) == 0.0
    assert 0.93 <= coverage(verdicts, 0.05) <= 0.97


def test_looks_spend_no_more_than_the_false_alarms_allowed():
    assert sum(LOOKS.values()) == pytest.approx(FALSE_ALARM_RATIO)


@pytest.mark.parametrize(("last_look", "alpha"), [(0, 0.01), (7, 0.01), (10, 0.003), (14, 0.0015), (20, 0.0)])
def test_final_look_may_spend_what_no_look_before_it_has(last_look, alpha):
    assert remaining_alpha(last_look) == pytest.approx(alpha)


def test_change_within_the_margin_is_the_same_even_where_it_is_certain():
    before = np.linspace(1.0, 1.1, 20)
    verdict = judge({"p50": timing_evidence(before, 1.01 * before)})["p50"]
    assert verdict.p_value < 1e-5
    assert verdict.change is Change.SAME


def test_faster_is_improved_and_of_a_rate_the_other_way_round():
    before, after = [1.0] * 10, [0.8 + 0.001 * i for i in range(10)]
    assert judge({"p50": timing_evidence(before, after)})["p50"].change is Change.IMPROVED
    verdict = judge({"fps": timing_evidence(before, after, higher_is_better=True)})["fps"]
    assert verdict.change is Change.REGRESSED
    assert verdict.effect == pytest.approx(1 / 0.8045 - 1, rel=1e-3)


def test_invalid_runs_never_count():
    before, after = [1.0] * 8, [1.0, None, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    evidence = timing_evidence([*before[:7], None], after)
    assert evidence.count == 6
    assert judge({"p50": timing_evidence([1.0] * 7, [2.0, 2.0, None, 2.0, 2.0, 2.0, None])})[
        "p50"
    ].change is (Change.UNKNOWN)


def test_too_few_runs_say_what_is_missing():
    verdict = judge({"p50": timing_evidence([1.0] * 5, [2.0] * 5)})["p50"]
    assert verdict.change is Change.UNKNOWN
    assert verdict.reason == "5 runs a side, where six are the fewest that bound a change"


def test_no_runs_at_all_are_unknown():
    assert judge({"p50": timing_evidence([None], [1.0])})["p50"].change is Change.UNKNOWN


def test_many_metrics_need_more_evidence_together():
    before, after = [1.0] * 10, [1.1 - 0.001 * i for i in range(9)] + [0.999]
    one = timing_evidence(before, after)
    assert judge({"a": one})["a"].change is Change.REGRESSED
    verdicts = judge({name: one for name in "abcdefgh"})
    assert {verdict.change for verdict in verdicts.values()} == {Change.UNKNOWN}


def answers(rng, samples, drop, discordant):
    """Right (1) or wrong (0) by both sides; each is alone right often enough to give the drop."""
    kinds = rng.choice(
        4, samples, p=[(discordant + drop) / 2, (discordant - drop) / 2, 0.9 - discordant, 0.1]
    )
    return np.isin(kinds, [0, 2]).astype(float), np.isin(kinds, [1, 2]).astype(float)


def accuracy_changes(drop, discordant, samples):
    rng = np.random.default_rng(1)
    for _ in range(TRIALS):
        evidence = correctness_evidence(*answers(rng, samples, drop, discordant))
        yield judge({"top1": evidence})["top1"].change


@pytest.mark.parametrize("discordant", [0.02, 0.05, 0.1])
def test_drop_of_the_margin_is_caught_with_the_samples_recommended_for_it(discordant):
    changes = list(accuracy_changes(0.01, discordant, samples_for(0.01, discordant)))
    assert np.mean([change is Change.REGRESSED for change in changes]) >= 0.95
    assert np.mean([change is Change.SAME for change in changes]) <= 0.035


@pytest.mark.parametrize("discordant", [0.0, 0.02, 0.05, 0.1])
def test_equally_good_sides_pass_with_the_samples_recommended(discordant):
    """To pass is SAME or IMPROVED, a statement that evidence carries; UNKNOWN is no pass."""
    changes = list(accuracy_changes(0.0, discordant, samples_for(0.01, discordant)))
    assert np.mean([change in (Change.SAME, Change.IMPROVED) for change in changes]) >= 0.99
    assert np.mean([change is Change.REGRESSED for change in changes]) <= FALSE_ALARM_RATIO


@pytest.mark.parametrize("others", [5, 35])
def test_samples_recommended_in_a_night_hold_for_all_of_its_scores(others):
    """One score drops by the margin among many that did not change, each with the samples that the night asks for."""
    rng, margin, discordant, trials = np.random.default_rng(2), 0.01, 0.04, 100
    asked = {i: correctness_evidence(*answers(rng, 500, 0.0, discordant)) for i in range(others + 1)}
    more = judge(asked)[0].samples_needed / asked[0].samples_needed
    samples = int(more * samples_for(margin, discordant))
    caught, passed = 0, []
    for _ in range(trials):
        drops = [margin] + [0.0] * others
        scores = {
            i: correctness_evidence(*answers(rng, samples, drop, discordant)) for i, drop in enumerate(drops)
        }
        dropped, *same = (verdict.change for verdict in judge(scores).values())
        caught += dropped is Change.REGRESSED
        passed += [change in (Change.SAME, Change.IMPROVED) for change in same]
    assert caught >= 0.9 * trials
    assert np.mean(passed) >= 0.99


def test_samples_recommended_for_a_score_by_bootstrap_decide_it():
    """A mean with a spread of 0.3: its interval at that size lies within the margin, or beyond 0 for a drop by it."""
    few = score_evidence(0.0, (-0.026, 0.026), 500, differing=500)
    assert few.samples_needed == pytest.approx(500 * (4.536 * 0.01327 / 0.01) ** 2, rel=0.01)
    half = 0.026 * np.sqrt(500 / few.samples_needed)
    enough = {"samples": few.samples_needed, "interval": (-half, half)}
    again = score_evidence(0.0, enough["interval"], enough["samples"], differing=9)
    assert judge({"map": again})["map"].change is Change.SAME
    dropped = score_evidence(0.01, (0.01 - half, 0.01 + half), enough["samples"], differing=9)
    assert judge({"map": dropped})["map"].change is Change.REGRESSED
    told = judge({"map": few})["map"]
    assert told.reason.endswith(f"open; {few.samples_needed:,} are recommended")


def test_no_difference_in_few_samples_is_no_pass_and_says_how_many_would_do():
    evidence = correctness_evidence([1.0] * 100, [1.0] * 100)
    verdict = judge({"top1": evidence})["top1"]
    assert (verdict.change, verdict.samples_needed) == (Change.UNKNOWN, samples_for(0.01, 0.0))
    assert verdict.reason == "100 samples leave -3.70 % to +3.70 % open; 4,103 are recommended"


def test_much_better_scores_pass_without_an_upper_bound_on_the_gain():
    before, after = [0.0] * 30 + [1.0] * 970, [1.0] * 1000
    assert judge({"top1": correctness_evidence(before, after)})["top1"].change is Change.IMPROVED


def test_scores_by_bootstrap_follow_the_same_rules():
    assert (
        judge({"map": score_evidence(0.03, (0.02, 0.04), 500, differing=90)})["map"].change
        is Change.REGRESSED
    )
    assert judge({"map": score_evidence(0.0, (-0.02, 0.008), 500, differing=90)})["map"].change is Change.SAME
    assert (
        judge({"map": score_evidence(0.01, (-0.01, 0.03), 500, differing=90)})["map"].change is Change.UNKNOWN
    )


def test_bootstrap_of_equal_records_claims_no_more_than_their_number_carries():
    few = score_evidence(0.0, (0.0, 0.0), 50, differing=0)
    assert few.interval == pytest.approx((-0.0711, 0.0711), abs=1e-3)
    assert judge({"map": few})["map"].change is Change.UNKNOWN
    assert judge({"map": score_evidence(0.0, (0.0, 0.0), 500, differing=0)})["map"].change is Change.SAME


def test_sides_of_different_samples_are_refused():
    with pytest.raises(ValueError, match="not of the same samples"):
        correctness_evidence([1.0], [1.0, 0.0])


def test_worst_change_is_the_one_of_all():
    assert overall([Change.SAME, Change.UNKNOWN, Change.REGRESSED]) is Change.REGRESSED
    assert overall([Change.SAME, Change.UNKNOWN, Change.IMPROVED]) is Change.UNKNOWN
    assert overall([Change.SAME, Change.IMPROVED]) is Change.IMPROVED
    assert overall([]) is Change.UNKNOWN
