import os
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file

from jetway.tasks.on_device import benchmark, memory, onnxruntime_engine, passport
from jetway.tasks.on_device.benchmark import CANARY, MIN_ROUNDS, Entrant, Session
from jetway.tasks.on_device.errors import DeviceError

pytestmark = pytest.mark.serial

LIMITS = {
    "warmup_runs": 3,
    "min_queries": 100,
    "min_duration_s": 0.12,
    "slice_s": 0.1,
    "max_drift_ratio": 0.15,
    "max_extensions": 3,
    "max_duration_s": 60.0,
    "seed": 7,
}


def spin(seconds):
    """A query whose time is the clock's, and so the same however busy the machine is."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def session_of(entrants, **limits):
    return Session(entrants, {**LIMITS, **limits}, lambda line: None)


def steady(name, seconds):
    return Entrant(name, lambda: spin(seconds))


def drifts(session):
    return [doubt for doubt in session.doubts() if "drifted" in doubt]


def test_every_variant_gets_its_queries_and_seconds():
    fast, slow = steady("fast", 0.0002), steady("slow", 0.002)
    session = session_of([fast, slow, steady(CANARY, 0.0005)], min_duration_s=0.2)
    session.run()
    rounds = session.all_rounds()
    for entrant in (fast, slow):
        assert entrant.queries(rounds) >= 100
        assert entrant.timed_ns(rounds) >= 0.2e9
    assert len(rounds) >= MIN_ROUNDS
    assert drifts(session) == []


def test_each_round_gives_every_engine_a_slice_in_a_shuffled_order():
    def order_of(seed):
        calls = []
        names = ("a", "b", "c", CANARY)
        entrants = [Entrant(name, lambda name=name: (calls.append(name), spin(0.001))) for name in names]
        session = session_of(entrants, seed=seed, min_queries=10, warmup_runs=1, slice_s=0.002)
        for _ in range(6):
            session._run_round()
        turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
        assert all(entrant.queries(range(6)) for entrant in entrants)
        return turns

    assert order_of(1) != order_of(2)
    assert {"a", "b", "c", CANARY} == set(order_of(1)[:4])


@pytest.mark.parametrize("start", [0.5, 0.65, 0.8])
def test_a_variant_that_slows_down_in_the_second_half_is_invalid(start):
    """Going on does not hide it: a step in the second half still lies behind the first third."""
    planned = MIN_ROUNDS
    session = None

    def slowing():
        spin(0.0006 if session is not None and session.rounds >= start * planned else 0.0004)

    entrants = [steady("baseline", 0.0004), Entrant("slowing", slowing), steady(CANARY, 0.0004)]
    session = session_of(entrants)
    session.run()
    assert session.extensions == 3
    assert len(drifts(session)) == 1
    assert drifts(session)[0].startswith("slowing drifted by ")


def test_a_short_disturbance_is_outlasted():
    session = None

    def disturbed():
        spin(0.0008 if session is not None and 8 <= session.rounds < 12 else 0.0004)

    entrants = [steady("baseline", 0.0004), Entrant("disturbed", disturbed), steady(CANARY, 0.0004)]
    session = session_of(entrants)
    session.run()
    assert 1 <= session.extensions <= 3
    assert drifts(session) == []


def test_a_machine_that_throttles_is_invalid_although_the_ratios_hold():
    session = None

    def query(seconds):
        spin(seconds * (2.5 if session is not None and session.rounds >= 6 else 1.0))

    entrants = [Entrant(name, lambda: query(0.0003)) for name in ("baseline", "pruned", CANARY)]
    session = session_of(entrants)
    session.run()
    assert len(drifts(session)) == 1
    assert "canary" in drifts(session)[0]
    assert "the machine" in drifts(session)[0]


@pytest.fixture
def busy_machine():
    """Twice as many processes as cores that want them for themselves."""
    command = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    time.sleep(0.3)
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


def test_a_busy_machine_is_told_by_the_scheduler(busy_machine):
    def work():
        sum(range(20_000))

    session = session_of([Entrant("baseline", work), Entrant(CANARY, work)])
    session.run()
    assert session.extensions == 3
    assert any("other processes held the CPU" in doubt for doubt in session.doubts())
    assert session.counted_rounds() == session.all_rounds()


def test_disturbed_rounds_do_not_count_when_the_calm_ones_suffice():
    session = session_of([steady("baseline", 0.0004), steady(CANARY, 0.0004)], min_queries=10)
    session.run()
    for _ in range(MIN_ROUNDS):
        session._run_round()
    for entrant in session.entrants:
        entrant.slice_waiting_ratios = [0.0] * session.rounds
    session.canary.slice_waiting_ratios[3] = 0.5
    assert session.counted_rounds() == [index for index in session.all_rounds() if index != 3]


def test_a_session_without_time_says_what_is_missing():
    session = session_of([steady("slow", 0.02), steady(CANARY, 0.001)], max_duration_s=0.3)
    session.run()
    assert any("slow has " in doubt and "of 100 queries" in doubt for doubt in session.doubts())


def test_throttling_is_read_from_the_kernels_counters():
    def snapshot(events, governor="performance"):
        return {"throttle_events": events, "frequencies_mhz": {"governors": [governor]}}

    assert benchmark.throttling(snapshot(3), snapshot(3)) == []
    assert benchmark.throttling(snapshot(None), snapshot(None)) == []
    assert "2 times" in benchmark.throttling(snapshot(3), snapshot(5))[0]
    assert "governor" in benchmark.throttling(snapshot(3), snapshot(3, "powersave"))[0]


def request(workplace, networks, **limits):
    image = workplace.images(1)
    return {
        **LIMITS,
        "engines": [workplace.entry(name, networks["conv"], image) for name in ("first", "second")],
        "canary": workplace.entry(CANARY, networks["conv"], image),
        "work_dir": str(workplace.work_dir),
        **limits,
    }


def test_the_verb_keeps_every_query(workplace, networks):
    result = benchmark.run(request(workplace, networks), workplace.progress.append)
    samples = load_file(result["samples"]["path"])
    assert passport.file_sha256(result["samples"]["path"]) == result["samples"]["sha256"]
    for name in ("first", "second", CANARY):
        latencies, rounds = samples[f"{name}.latency_ns"], samples[f"{name}.round"]
        assert latencies.dtype == np.int64
        assert len(latencies) == len(rounds) >= 100
        assert sorted(set(rounds)) == list(range(result["rounds"]))
        assert latencies.min() > 1000
    assert set(result["drift_ratios"]) == {"first", "second", CANARY}
    assert result["machine_after"]["load_average"][0] >= 0
    assert workplace.progress[-1]["done"] > 0.9


def test_a_corrupt_engine_is_refused_before_anything_runs(workplace, networks):
    asked = request(workplace, networks)
    with open(asked["engines"][1]["path"], "r+b") as file:
        file.seek(3000)
        file.write(b"\xff\xff")
    with pytest.raises(DeviceError, match="corrupt"):
        benchmark.run(asked, workplace.progress.append)
    assert not any("round" in line["text"] for line in workplace.progress)


def test_peak_memory_is_of_a_process_of_its_own(workplace, networks):
    hog = np.ones(64 << 20, dtype=np.uint8)  # what this process holds must not show
    entry = workplace.entry("conv", networks["conv"], workplace.images(1))
    entry["load_options"] = onnxruntime_engine.load_options(1)
    measured = memory.peak_of(entry)
    assert hog.nbytes > 0
    assert 10 < measured["peak"] < 200
    assert 0 < measured["engine"] < 60


def test_a_failing_memory_process_says_why(workplace, networks):
    entry = workplace.entry("conv", networks["conv"], workplace.images(1))
    entry["load_options"] = onnxruntime_engine.load_options(1)
    with pytest.raises(DeviceError, match=r"no such file|No such file"):
        memory.peak_of(dict(entry, inputs="/no/such/file"))


def test_the_harness_is_as_fast_as_a_plain_session(workplace, networks):
    """The saved engine in the session against ORT_ENABLE_ALL on the ONNX file, interleaved: within 5 %."""
    entry = workplace.entry("engine", networks["conv"], workplace.images(1))
    entry["load_options"] = passport.read(entry["path"])["load_options"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    plain = onnxruntime.InferenceSession(networks["conv"], options, providers=["CPUExecutionProvider"])
    inputs = {"image": load_file(entry["inputs"])["image"]}

    def ratio():
        engine = benchmark._load(entry)
        entrants = [Entrant("plain", lambda: plain.run(None, inputs)), engine, steady(CANARY, 0.0003)]
        session = session_of(entrants, min_duration_s=1.0, min_queries=500, slice_s=0.05)
        session.run()
        rounds = session.counted_rounds()
        pairs = zip(engine.medians_ns(rounds), entrants[0].medians_ns(rounds), strict=True)
        return float(np.median([mine / theirs for mine, theirs in pairs]))

    # A session's place in memory alone is worth 2 %, so a slow one is loaded once more.
    assert min(ratio(), ratio()) < 1.05
