"""Checklists of a deployment, before it goes to work and while it works, judged from what its target showed.

Nothing here talks to a target or to MLflow: ``flows/deployed.py`` brings what was recorded and what is there now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from jetway.configs.schema import Gate, Recipe, Target
from jetway.tasks.artifacts import Engine
from jetway.tasks.checks import Check, judged, skipped
from jetway.tasks.deployment import Deployment
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.results import VariantResult, Verdict
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.target_state import (
    clocks_check,
    power_mode_check,
    room_check,
    simulated_checks,
    supply_check,
)
from jetway.tasks.workload import Record, Workload

#: What a run adds to an engine's passport on the host.
RUN_FACTS = {"remote_path", "reused", "target"}
#: What real time means where the recipe has no gate on latency or throughput.
REAL_TIME_SAMPLES_PER_S = 30.0
#: How far a metric of the same samples may move: rounding in its own sum.
METRIC_TOLERANCE = 1e-6
#: Accuracy is looked at on this many samples at most.
ACCURACY_SAMPLES = 256
SLOWER_MACHINE = "the machine is slower, so look at its power mode, its clocks and what else runs there"

#: The hottest that any zone may be, and how much warmer the last third of a soak may be than its first.
MAX_TEMPERATURE_C = 60.0
MAX_TEMPERATURE_RISE_C = 10.0
#: What the process may grow by, first third to last: a share, or so many MiB if that is more.
MAX_GROWTH_RATIO = 0.05
MIN_GROWTH_LIMIT_MIB = 8.0
#: A window counts when we waited no longer than this for a core that another process held.
MAX_WAITING_RATIO = 0.25
#: Windows that make a first and a last third worth comparing.
MIN_WINDOWS = 6
SOAK_CHECKS = ("soak: frame rate", "soak: temperature", "soak: memory", "soak: machine")

Window = Mapping[str, Any]


# Before it goes to work


def before_checks(
    found: Deployment,
    target: Target,
    info: TargetInfo,
    state: Mapping[str, Any],
    file: Mapping[str, Any],
    *,
    power_mode: str | None = None,
) -> Iterator[Check]:
    """``state`` is what the verb ``checkup`` said, ``file`` what ``engine_file`` said.

    ``power_mode`` is the mode that it is measured in, None for whichever is set.
    """
    yield from simulated_checks(info)
    yield gates_check(found.row)
    yield onnx_check(found)
    yield engine_file_check(found.engine, file)
    yield passport_check(found.engine, file)
    yield fit_check(found.engine, file)
    yield dependencies_check(found, target, info)
    yield room_check("disk", state["free_disk_mib"], target.min_free_disk_mib)
    yield memory_check(found.row, target, state["memory_mib"]["available"])
    yield clocks_check(state)
    yield power_mode_check(state["power"], power_mode)
    yield supply_check(state)
    yield camera_check(state["cameras"])


def gates_check(row: VariantResult) -> Check:
    """Whether the run that packaged it was valid and passed its gates."""
    failed = [gate.name for gate in row.gates if gate.verdict is not Verdict.PASS]
    doubts = [f"gate not passed: {name}" for name in failed]
    doubts += [f"INVALID measurement: {reason}" for reason in row.validity.reasons]
    told = (
        f"{len(row.gates) - len(failed)} of {len(row.gates)} gates passed" if row.gates else "it has no gates"
    )
    evidence = f"{row.variant}: {told}"
    return judged("recorded run", not doubts, "; ".join([evidence, *doubts]))


def onnx_check(found: Deployment) -> Check:
    """Whether the ONNX file was verified, and in which precision it was lowered."""
    facts = found.engine.metadata.get("provenance", {}).get("metadata", {})
    form = f"{facts.get('precision')}, opset {facts.get('opset')}"
    excess = found.parity_excess
    if excess is None:
        return judged("ONNX model", False, f"{form}; the run has no record that it was held against PyTorch")
    return judged("ONNX model", excess <= 1, f"{form}; its error is {excess:.2g} of what verify allows")


def engine_file_check(engine: Engine, file: Mapping[str, Any]) -> Check:
    name, digest = "engine file", file["sha256"]
    if digest is None:
        return judged(
            name, False, "the file is no longer on the target. Run the recipe again: it is built anew."
        )
    if digest != engine.sha256:
        return judged(
            name,
            False,
            f"corrupt: sha256 {digest[:12]}, {file['size_bytes']} bytes; recorded {engine.sha256[:12]}, "
            f"{engine.size_bytes} bytes. Do not use it; run the recipe again: it is built anew.",
        )
    return judged(name, True, f"sha256 {digest[:12]}, {file['size_bytes']} bytes, as recorded")


def passport_check(engine: Engine, file: Mapping[str, Any]) -> Check:
    """Whether the passport beside the engine says what the run recorded, key by key."""
    name, there = "passport", file["passport"]
    if there is None:
        return judged(name, False, "there is none to read beside the engine. Run the recipe again.")
    recorded = {key: value for key, value in engine.metadata.items() if key not in RUN_FACTS}
    changed = [key for key in sorted(recorded.keys() | there.keys()) if recorded.get(key) != there.get(key)]
    evidence = f"differs from the recorded one in: {', '.join(changed)}" if changed else "as recorded"
    return judged(name, not changed, evidence)


def fit_check(engine: Engine, file: Mapping[str, Any]) -> Check:
    """Whether the engine was built for the machine and the engine version that are there now."""
    name, here, built = "board and version", file["platform"], engine.metadata["platform"]
    if here is None:
        return judged(name, False, file["reason"] or "without a passport nothing says what it was built for")
    changed = [
        f"{key} is {here.get(key)}, was {built.get(key)}" for key in here if here[key] != built.get(key)
    ]
    if changed:
        return judged(name, False, f"{'; '.join(changed)}. Run the recipe again on this target.")
    return judged(
        name, True, f"{here['engine']} {here['engine_version']} on {here['architecture']}, as built"
    )


def dependencies_check(found: Deployment, target: Target, info: TargetInfo) -> Check:
    backend = target.backend(found.variant)
    engine = info.engines[backend.engine]
    evidence = engine.version if engine.available else engine.reason
    return judged("dependencies", engine.available, f"Python {info.python}, {backend.engine}: {evidence}")


def memory_check(row: VariantResult, target: Target, available_mib: float | None) -> Check:
    """Whether the engine fits beside what the target file asks to stay free."""
    peak_mib = row.value("peak_memory_mib")
    if peak_mib is None or available_mib is None:
        return skipped("memory", "the peak of the engine, or the memory of the target, is not known")
    left_mib = available_mib - peak_mib
    return judged(
        "memory",
        left_mib >= target.min_free_memory_mib,
        f"{available_mib:.0f} MiB available, {peak_mib:.0f} MiB at its peak: {left_mib:.0f} MiB left, "
        f"{target.min_free_memory_mib} asked for (min_free_memory_mib)",
        peak_mib=peak_mib,
        available_mib=available_mib,
    )


def camera_check(cameras: Sequence[str]) -> Check:
    seen = f"the kernel sees: {', '.join(cameras)}" if cameras else "the kernel sees none"
    return skipped("camera", f"Jetway deploys the network and opens no camera; {seen}")


# While it works


def accuracy_check(workload: Workload, recorded: Sequence[Record], now: Sequence[Record]) -> Check:
    """Whether the same samples score as they did. ``now`` are the first of those that were recorded."""
    then = workload.summarize(recorded[: len(now)])
    today = workload.summarize(now)
    parts, equal = [], True
    for metric in workload.metrics:
        value, before = today[metric.name], then[metric.name]
        equal &= abs(value - before) <= METRIC_TOLERANCE * max(1.0, abs(before))
        parts.append(f"{metric.name} {value:.6g}, recorded {before:.6g}")
    return judged("accuracy", equal, f"{'; '.join(parts)}, on {len(now)} samples")


def latency_check(found: Deployment, now: BenchmarkResult, max_drift_ratio: float) -> Check:
    """Whether the median is where it was recorded, give or take what the recipe calls a drift."""
    name, measured = "latency", now.variants[found.row.variant].latency
    then_ms, p50_ms = found.row.value("latency_ms_p50"), measured.p50_ms
    if not now.validity.valid or then_ms is None or p50_ms is None:
        reasons = "; ".join(now.validity.reasons) or "too few queries for a median"
        return judged(name, False, f"the measurement is INVALID, check again: {reasons}")
    low_ms, high_ms = measured.intervals_ms["p50"]
    then_low_ms, then_high_ms = found.row.intervals.get("latency_ms_p50", (then_ms, then_ms))
    limit_ms = then_high_ms * (1 + max_drift_ratio)
    passed = low_ms <= limit_ms
    return judged(
        name,
        passed,
        f"p50 {p50_ms:.4g} ms [{low_ms:.4g}, {high_ms:.4g}], recorded {then_ms:.4g} [{then_low_ms:.4g}, "
        f"{then_high_ms:.4g}], up to {limit_ms:.4g} allowed (benchmark.max_drift_ratio {max_drift_ratio:g})"
        + ("" if passed else _who_is_slower(p50_ms / then_ms, found, now, max_drift_ratio)),
        p50_ms=p50_ms,
        recorded_ms=then_ms,
        limit_ms=limit_ms,
    )


def _who_is_slower(ratio: float, found: Deployment, now: BenchmarkResult, max_drift_ratio: float) -> str:
    """The engine, or the whole machine: the canary is the same network on both days."""
    if found.canary_ms_p50 is None or now.canary.p50_ms is None:
        return ""
    machine_ratio = now.canary.p50_ms / found.canary_ms_p50
    who = "the engine is slower" if ratio > machine_ratio * (1 + max_drift_ratio) else SLOWER_MACHINE
    return f". It takes {ratio:.2f} times as long, the canary {machine_ratio:.2f} times: {who}"


def rate_check(variant: str, gates: Iterable[Gate], metrics: Mapping[str, float | None]) -> Check:
    """Real time: the recipe's own gates on latency and throughput, or 30 samples a second without any."""
    own = [
        gate
        for gate in gates
        if fnmatchcase(variant, gate.variant) and gate.metric.startswith(("latency_ms_", "throughput_"))
    ]
    limits = own or [
        Gate(metric="throughput_samples_per_s", op=">=", limit=REAL_TIME_SAMPLES_PER_S, variant=variant)
    ]
    parts, passed = [], True
    for gate in limits:
        value = metrics.get(gate.metric)
        passed &= value is not None and (value <= gate.limit if gate.op == "<=" else value >= gate.limit)
        told = "not measured" if value is None else f"{value:.4g}"
        parts.append(f"{gate.metric} {told}, {gate.op} {gate.limit:g} asked for")
    source = "the recipe's gates" if own else "the checklist's own limit, as the recipe has no such gate"
    return judged("real time", passed, f"{'; '.join(parts)} ({source})")


# The soak test


def soak_checks(result: Mapping[str, Any], recipe: Recipe, batch_size: int) -> Iterator[Check]:
    """What the verb ``soak`` found, first third of its windows against the last."""
    windows = result["windows"]
    yield frame_rate_check(windows, recipe.benchmark.max_drift_ratio, batch_size)
    yield temperature_check(windows)
    yield growth_check(windows)
    reasons = result["reasons"]
    evidence = "; ".join(reasons) or "nothing throttled, and no clock or mode was changed"
    yield judged("soak: machine", not reasons, evidence)


def no_soak_checks() -> list[Check]:
    return [skipped(name, "not asked for: add --soak MINUTES") for name in SOAK_CHECKS]


def thirds(windows: Sequence[Window], key: str) -> tuple[float, float] | None:
    """Median of the first and the last third of what is known; None with too little of it."""
    values = [window[key] for window in windows if window[key] is not None]
    size = len(values) // 3
    return (median(values[:size]), median(values[-size:])) if len(values) >= MIN_WINDOWS else None


def frame_rate_check(windows: Sequence[Window], max_drift_ratio: float, batch_size: int) -> Check:
    """Only windows count in which other processes left us the CPU."""
    name = SOAK_CHECKS[0]
    calm = [window for window in windows if window["waiting_ratio"] <= MAX_WAITING_RATIO]
    ends = thirds(calm, "queries_per_s")
    minutes = (windows[-1]["end_s"] - windows[0]["start_s"]) / 60
    counted = f"{len(calm)} of {len(windows)} windows over {minutes:.2g} minutes"
    if ends is None:
        return judged(
            name,
            False,
            f"only {counted} had the CPU to themselves, {MIN_WINDOWS} are needed: stop other work there, or soak "
            "longer",
        )
    first, last = (rate * batch_size for rate in ends)
    loss = 1 - last / first
    return judged(
        name,
        loss <= max_drift_ratio,
        f"{first:.4g} samples/s in the first third, {last:.4g} in the last: {-loss:+.1%}, a loss of "
        f"{max_drift_ratio:.0%} is allowed (benchmark.max_drift_ratio); {counted}",
        first_samples_per_s=first,
        last_samples_per_s=last,
        minutes=minutes,
    )


def temperature_check(windows: Sequence[Window]) -> Check:
    name, ends = SOAK_CHECKS[1], thirds(windows, "temperature_c")
    if ends is None:
        return skipped(name, "this machine tells too few temperatures")
    peak_c = max(window["temperature_c"] for window in windows if window["temperature_c"] is not None)
    rise_c = ends[1] - ends[0]
    return judged(
        name,
        peak_c <= MAX_TEMPERATURE_C and rise_c <= MAX_TEMPERATURE_RISE_C,
        f"hottest zone {peak_c:.1f} °C, {MAX_TEMPERATURE_C:.0f} allowed; {rise_c:+.1f} °C from the first third to the "
        f"last, {MAX_TEMPERATURE_RISE_C:.0f} allowed",
        peak_c=peak_c,
        rise_c=rise_c,
    )


def growth_check(windows: Sequence[Window]) -> Check:
    """Of the process, and on a GPU of what it holds there."""
    name, evidence, grown = SOAK_CHECKS[2], [], False
    values = {}
    for key, what in (("process_memory_mib", "process"), ("device_memory_mib", "GPU")):
        ends = thirds(windows, key)
        if ends is not None:
            growth_mib, limit_mib = ends[1] - ends[0], max(MIN_GROWTH_LIMIT_MIB, MAX_GROWTH_RATIO * ends[0])
            grown |= growth_mib > limit_mib
            evidence.append(f"{what} {ends[0]:.1f} MiB, {growth_mib:+.1f} MiB of {limit_mib:.1f} allowed")
            values[key] = growth_mib
    if not evidence:
        return skipped(name, "too few windows, or the kernel tells no memory: soak longer")
    return judged(name, not grown, "; ".join(evidence), **values)
