import os
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file

from jetway.configs.load import load_recipe
from jetway.configs.schema import Precision
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.on_device import benchmark, memory, passport, sessions
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.latency import CANARY, MIN_ROUNDS, Entrant, ReloadedEntrant, Session
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

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
        # ever slower, as a busy machine's session has more rounds, and only some of them count
        spin(seconds * (1.0 + (session.rounds if session is not None else 0) / 4))

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


def test_engines_that_do_not_fit_in_memory_together_are_loaded_for_their_slices(workplace, networks):
    asked = request(workplace, networks, keep_loaded=False)
    samples = load_file(benchmark.run(asked, workplace.progress.append)["samples"]["path"])
    reloaded = {name: np.median(samples[f"{name}.latency_ns"]) for name in ("first", "second", CANARY)}
    # A load takes some ms and a query some 100 us: no query holds a load.
    assert max(reloaded.values()) < 3 * min(reloaded.values())


def test_a_reloaded_engine_is_unloaded_after_each_slice():
    events = []

    def load():
        events.append("load")
        return (lambda: events.append("run")), (lambda: events.append("unload"))

    entrant = ReloadedEntrant("big", load)
    entrant.warm_up(5)
    assert events == []
    for _ in range(2):
        entrant.run_slice(0)
    assert [event for event in events if event != "run"] == ["load", "unload"] * 2
    assert events.index("unload") > 5
    assert len(entrant.latencies_ns) == 2


@pytest.mark.parametrize(
    ("asked", "engine", "device", "free", "kept"),
    [
        ("auto", 1.0, None, None, True),
        ("auto", 1e9, None, None, False),
        ("auto", 1.0, 40.0, 200.0, True),
        ("auto", 1.0, 80.0, 200.0, False),
        (True, 1e9, 80.0, 1.0, True),
        (False, 1.0, None, None, False),
    ],
)
def test_engines_stay_loaded_where_the_memory_holds_them(asked, engine, device, free, kept):
    peak = {"peak": 1.0, "engine": engine, "device": device, "device_free": free}
    assert benchmark.keep_loaded({"keep_loaded": asked}, {name: peak for name in "ab"}) is kept


def test_an_engine_without_queries_in_flight_is_left_out_of_their_passes_and_that_is_said(
    workplace, networks
):
    asked = request(workplace, networks, scenarios=["latency", "throughput"], profile_layers=True)
    result = benchmark.run(asked, workplace.progress.append)
    assert result["left_out"] == {"first": ["throughput", "layers"], "second": ["throughput", "layers"]}
    assert result["throughput"] == result["layers"] == {}
    assert result["samples"]


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
    entry = sessions.checked(workplace.entry("conv", networks["conv"], workplace.images(1)))
    measured = memory.peak_of(entry)
    assert hog.nbytes > 0
    assert 10 < measured["peak"] < 200
    assert 0 < measured["engine"] < 60


def test_a_failing_memory_process_says_why(workplace, networks):
    entry = sessions.checked(workplace.entry("conv", networks["conv"], workplace.images(1)))
    with pytest.raises(DeviceError, match=r"no such file|No such file"):
        memory.peak_of(dict(entry, inputs="/no/such/file"))


@pytest.fixture(scope="module")
def digits_onnx(tmp_path_factory):
    """The baseline of the digits recipe as its export gives it. Not trained, which changes no speed."""
    recipe, _ = load_recipe("digits")
    context = StageContext(
        load_workload(recipe.workload, search_path=[]), Store(tmp_path_factory.mktemp("digits")), threads=1
    )
    baseline = save_checkpoint(context.store, context.workload.network().eval(), structure=None)
    return context.store.open(export_onnx(context, baseline, recipe.export, Precision.FP32).handle)


def test_the_digits_baseline_is_as_fast_as_a_plain_session(workplace, digits_onnx):
    """The saved engine against ORT_ENABLE_ALL on the ONNX file, interleaved in our session: within 5 %.

    Where a session happens to lie in memory is worth 2 % of its speed, so both are loaded several times anew.
    """
    image = np.random.default_rng(0).standard_normal((1, 1, 32, 32), dtype=np.float32)
    entry = sessions.checked(workplace.entry("engine", digits_onnx, workplace.save("image", image=image)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def ratio(seed):
        plain = onnxruntime.InferenceSession(digits_onnx, options, providers=["CPUExecutionProvider"])
        query, close = benchmark.opened_query(entry)
        engine, other = Entrant("engine", query), Entrant("plain", lambda: plain.run(None, {"image": image}))
        limits = {"min_duration_s": 0.3, "slice_s": 0.02, "max_extensions": 0, "seed": seed}
        session = session_of([engine, other, steady(CANARY, 0.0003)], **limits)
        session.run()
        close()
        rounds = session.all_rounds()
        pairs = zip(engine.medians_ns(rounds), other.medians_ns(rounds), strict=True)
        return np.median([mine / theirs for mine, theirs in pairs])

    assert 0.95 <= np.median([ratio(seed) for seed in range(5)]) <= 1.05
