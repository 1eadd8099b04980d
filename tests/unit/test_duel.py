"""Pairs, looks and budgets on made-up runs; tests/integration/test_in_turns.py has real ones."""

import random
from collections import Counter

import numpy as np
import pytest

from jetway.tasks.artifacts import Tensors
from jetway.tasks.duel import Budget, counted_pairs, duel
from jetway.tasks.measurement import BenchmarkResult, LatencySummary
from jetway.tasks.results import Validity
from jetway.tasks.verdict import LOOKS, Change

STATE = {
    "load_average": (0, 0, 0), "frequencies_mhz": {}, "throttle_events": None, "stolen_ms": None,
    "temperatures_c": {}, "memory_available_mib": None,
}  # fmt: skip


def measured(p50_ms, *, canary_ms=0.5, valid=True):
    """A session of one engine, with no more than a duel reads."""
    latency, canary = (
        LatencySummary(
            count=1000, timed_s=2.0, mean_ms=value, stdev_ms=0.1, p50_ms=value, p90_ms=None, p95_ms=None, p99_ms=None
        )
        for value in (p50_ms, canary_ms)
    )  # fmt: skip
    engine = {
        "variant": "v", "latency": latency, "throughput_samples_per_s": 1.0, "peak_memory_mib": None,
        "engine_memory_mib": None, "drift_ratio": 0.0, "p50_ratio": {"value": 1.0, "interval": (1.0, 1.0)},
    }  # fmt: skip
    return BenchmarkResult(
        target="orin", variants={"v": engine}, samples=Tensors(sha256="c" * 64, size_bytes=1), canary=canary,
        validity=Validity(valid=valid, reasons=() if valid else ("disturbed",)), canary_drift_ratio=0.0, rounds=12,
        excluded_rounds=(), extensions=0, slice_s=0.1, seed=0, machine_before=STATE, machine_after=STATE, boot_id="b",
    )  # fmt: skip


class Machine:
    """Measures a side in a second of its clock: how slow it is, and how noisy, and which runs are INVALID."""

    def __init__(self, slowdown=1.0, noise=0.01, invalid=(), seed=0):
        self.rng = np.random.default_rng(seed)
        self.slowdown, self.noise, self.invalid = slowdown, noise, invalid
        self.sides = []

    def measure(self, side):
        self.sides.append(side)
        p50_ms = np.exp(self.rng.normal(0, self.noise)) * (self.slowdown if side == "candidate" else 1.0)
        return measured(p50_ms, valid=len(self.sides) not in self.invalid)

    def clock(self):
        return float(len(self.sides))


def fight(machine, **options):
    return duel(machine.measure, clock=machine.clock, **options)


def test_calm_equal_engines_are_the_same_after_the_first_look():
    machine = Machine(noise=0.002)
    result = fight(machine)
    assert (result.verdict.change, result.verdict.count) == (Change.SAME, min(LOOKS))
    assert len(result.runs) == len(machine.sides) == 2 * min(LOOKS)
    assert result.p50_ms("champion") == pytest.approx(1.0, abs=0.01)


def test_slower_engine_is_found_within_ten_runs_a_side():
    result = fight(Machine(slowdown=1.05))
    assert (result.verdict.change, result.verdict.count) == (Change.REGRESSED, 10)
    assert result.verdict.effect == pytest.approx(0.05, abs=0.015)


def test_faster_engine_is_improved():
    assert fight(Machine(slowdown=0.9)).verdict.change is Change.IMPROVED


def test_each_pair_has_both_sides_in_an_order_that_is_drawn():
    machine = Machine(noise=0.5)
    result = fight(machine, seed=3)
    pairs = list(zip(machine.sides[::2], machine.sides[1::2], strict=True))
    assert {frozenset(pair) for pair in pairs} == {frozenset(("champion", "candidate"))}
    assert min(Counter(pair[0] for pair in pairs).values()) >= len(pairs) // 4
    assert fight(Machine(noise=0.5), seed=3) == result


def test_mood_of_the_machine_that_the_canary_shares_is_no_noise():
    machine = Machine(noise=0.002)

    def measure(side):
        mood = np.exp(machine.rng.normal(0, 0.2))
        return measured(machine.measure(side).canary.p50_ms * mood, canary_ms=0.5 * mood)

    assert duel(measure, clock=machine.clock).verdict.count == min(LOOKS)


def test_noise_takes_all_pairs_and_ends_unknown():
    result = fight(Machine(noise=0.3))
    assert (result.verdict.change, result.verdict.count) == (Change.UNKNOWN, max(LOOKS))
    assert "20 runs leave" in result.verdict.reason


def test_invalid_runs_are_kept_and_do_not_count():
    machine = Machine(noise=0.002, invalid=(1, 5))
    result = fight(machine)
    assert [run.validity.valid for run in result.runs][:5] == [False, True, True, True, False]
    assert result.verdict.count == min(LOOKS)
    assert len(counted_pairs(result.runs)) == min(LOOKS)
    assert len(machine.sides) == 2 * min(LOOKS) + 1 + 2


def test_each_run_is_told_as_it_ends():
    told = []
    result = fight(Machine(noise=0.002), on_run=lambda runs: told.append(len(runs)))
    assert told == list(range(1, len(result.runs) + 1))


def test_nothing_but_invalid_runs_ends_with_the_budget():
    result = fight(Machine(invalid=range(1000)), budget=Budget(runs=9))
    assert (result.verdict.change, result.verdict.count) == (Change.UNKNOWN, 0)
    assert len(result.runs) == 8
    assert result.p50_ms("champion") is None


def test_clock_ends_a_duel_between_two_looks_with_what_was_seen():
    """Eight pairs of which all agree are significant at what no look has spent yet."""
    result = fight(Machine(slowdown=1.2, noise=0.001), budget=Budget(minutes=16 / 60))
    assert (result.verdict.change, result.verdict.count) == (Change.REGRESSED, 8)


def test_duels_that_are_read_together_share_the_false_alarms():
    worse = [1.1] * 9 + [0.999]  # nine pairs of ten agree: p is 0.002

    def measure_from(values):
        values = iter(values)
        return lambda side: measured(next(values) if side == "candidate" else 1.0)

    assert duel(measure_from(worse * 2)).verdict.count == 10
    assert duel(measure_from(worse * 2), comparisons=8).verdict.count > 10


@pytest.mark.parametrize("budget", [{"runs": 1}, {"minutes": 0.0}, {"minutes": float("nan")}])
def test_budget_without_room_for_a_pair_is_refused(budget):
    with pytest.raises(ValueError, match="no room for a pair"):
        Budget(**budget)


def test_order_of_pairs_does_not_disturb_other_random_numbers():
    random.seed(1)
    expected = random.Random(1).random()
    fight(Machine(noise=0.002))
    assert random.random() == expected
