"""A finished run with made-up figures: as a report takes it, and in MLflow as a flow leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from safetensors.numpy import save_file

from jetway.configs.schema import Gate
from jetway.flows.pipeline import yaml_of
from jetway.flows.record import RESULT_PATH, RunResult, validity_of, worst_gate
from jetway.tasks.artifacts import Checkpoint, Engine, OnnxModel, Report, Tensors
from jetway.tasks.cascade_result import STEPS as CASCADE_STEPS
from jetway.tasks.cascade_result import CascadeResult, VariantCascade
from jetway.tasks.compare import derive_metrics
from jetway.tasks.environment import describe_environment
from jetway.tasks.gates import evaluate_gates, gates_exit_code
from jetway.tasks.layer_table import Layer
from jetway.tasks.measurement import (
    NS_PER_MS,
    BenchmarkResult,
    LatencySummary,
    MachineState,
    VariantMeasurement,
    measure_variants,
)
from jetway.tasks.metrics import Metric
from jetway.tasks.report.material import CalibrationMaterial, Lineage, RunMaterial, TargetMaterial
from jetway.tasks.results import Validity, VariantResult
from jetway.tasks.store import Store
from jetway.tasks.stream_result import END_TO_END, STEPS, Rate, StreamResult, VariantStream
from jetway.tasks.target_info import CpuInfo, EngineInfo, MemoryInfo, TargetInfo
from jetway.tasks.tracking.tracker import Tracker

TOP1 = Metric(name="top1")
VARIANTS = ("baseline-fp32", "pruned-fp32", "pruned-fp16", "pruned-int8-ptq", "pruned-int8-qat")
GATES = ("*: size_ratio <= 1.0", "pruned-*: latency_p50_ratio <= 0.6", "pruned-int8-qat: top1_drop <= 0.01")
#: Of a variant against the one before it.
SHRINKING = 0.55
ROUNDS = 40
DIGEST = "0123456789abcdef" * 4
SAMPLES = Tensors(sha256=DIGEST, size_bytes=1)
CALIBRATION = CalibrationMaterial("night", DIGEST, 130, {"dark, 3 digits": 90, "dark, 4 digits": 40}, ["fog"])


def make_run(
    targets: Sequence[str] = ("loopback",),
    variants: Sequence[str] = VARIANTS,
    *,
    queries: int = 800,
    reasons: Sequence[str] = (),
    simulated: bool = False,
    gates: Sequence[str] = GATES,
    description: str = "A network of the tests.",
    **changes: object,
) -> RunMaterial:
    """A run of these variants on each target; ``reasons`` make every session INVALID."""
    sessions = {
        target: make_target(target, variants, queries, reasons, seed=index)
        for index, target in enumerate(targets)
    }
    rows = [
        make_row(target, variant, index, session, simulated=simulated)
        for target, session in sessions.items()
        for index, variant in enumerate(variants)
    ]
    judged = evaluate_gates(derive_metrics(rows, [TOP1]), [Gate.model_validate(gate) for gate in gates])
    values = {
        "run_id": "4f1c" * 8,
        "name": "tiny 2026-11-21 19:00:00",
        "recipe": "tiny",
        "description": description,
        "started": datetime(2026, 11, 21, 19, tzinfo=UTC),
        "rows": judged,
        "metrics": [TOP1],
        "targets": sessions,
        "settings": {"train.epochs": "4", "qat.epochs": "1"},
        "environment": describe_environment(),
        "lineage": [
            Lineage(
                row.variant, row.target, (("weights", DIGEST), ("engine", DIGEST[::-1])), "onnxruntime 1.31.1"
            )
            for row in rows
        ],
        "calibration": [CALIBRATION],
    }
    return RunMaterial(**(values | changes))


def make_row(
    target: str, variant: str, index: int, session: TargetMaterial, *, simulated: bool
) -> VariantResult:
    score = 0.985 - 0.004 * index
    half = 0.006
    measured = session.benchmark.variants[variant]
    return VariantResult(
        variant=variant,
        target=target,
        precision="fp32",
        engine="onnxruntime",
        board=session.info.machine,
        simulated=simulated,
        metrics={
            "params": 1.5e6 * SHRINKING**index,
            "macs": 32e6 * SHRINKING**index,
            "size_bytes": 6e6 * SHRINKING**index,
            "top1": score,
            **measured.metrics(),
        },
        intervals={**measured.intervals(), "top1_drop": (0.004 * index - half, 0.004 * index + half)},
        validity=session.benchmark.validity,
    )


def make_target(
    target: str, variants: Sequence[str], queries: int, reasons: Sequence[str], *, seed: int
) -> TargetMaterial:
    """One session of all variants, its samples drawn with a long tail."""
    rng = np.random.default_rng(seed)
    rounds = np.sort(np.arange(queries) % ROUNDS).astype(np.int32)
    samples = {
        name: (
            (0.7 * SHRINKING**index * NS_PER_MS * rng.lognormal(0, 0.08, queries)).astype(np.int64),
            rounds,
        )
        for index, name in enumerate(variants)
    }
    measured = measure_variants(
        samples,
        tuple(variants),
        memory={name: {"peak": 60.0, "engine": 10.0} for name in variants},
        drift_ratios=dict.fromkeys(variants, 0.01),
        batch_size=1,
        seed=0,
    )
    validity = Validity(valid=not reasons, reasons=tuple(reasons))
    return TargetMaterial(
        info=make_info(target),
        benchmark=make_benchmark(target, measured, validity),
        latencies_ms={name: latencies / NS_PER_MS for name, (latencies, _) in samples.items()},
        stream=make_stream(target, variants),
        cascade=make_cascade(target, variants),
    )


def make_info(target: str) -> TargetInfo:
    return TargetInfo(
        schema_version=1,
        hostname=target,
        os="Debian GNU/Linux 12",
        kernel="6.1",
        python="3.11.7",
        board=None,
        l4t=None,
        boot_id="a boot",
        cpu=CpuInfo(
            model="A CPU", architecture="x86_64", instruction_sets=(), int8_instruction_sets=("avx512_vnni",)
        ),
        cores=2,
        memory_mib=MemoryInfo(total=8000.0, available=4000.0),
        free_disk_mib=1e4,
        frequencies_mhz={},
        accelerators={},
        engines={"onnxruntime": EngineInfo(available=True, version="1.31.1")},
    )


def make_benchmark(
    target: str, measured: dict[str, VariantMeasurement], validity: Validity
) -> BenchmarkResult:
    state = MachineState(
        load_average=(0.1, 0.1, 0.1),
        frequencies_mhz={},
        throttle_events=None,
        stolen_ms=None,
        temperatures_c={},
        memory_available_mib=4000.0,
    )
    layers = tuple(
        Layer(name=f"/stage{index}/Conv + /stage{index}/Relu", precision="int8", time_ms=0.01 * (index + 1))
        for index in range(20)
    )
    return BenchmarkResult(
        target=target,
        variants=measured,
        validity=validity,
        samples=SAMPLES,
        canary=next(iter(measured.values())).latency,
        canary_drift_ratio=0.01,
        rounds=ROUNDS + 1,
        excluded_rounds=(ROUNDS,),
        extensions=0,
        slice_s=0.1,
        seed=0,
        machine_before=state,
        machine_after=state,
        boot_id="a boot",
        layers={name: layers for name in measured if "int8" in name},
    )


def make_stream(target: str, variants: Sequence[str]) -> StreamResult:
    frames = {
        name: VariantStream(
            steps=make_steps(STEPS, SHRINKING**index),
            one_by_one_fps=Rate(value=100.0, interval=(98.0, 102.0)),
            pipelined_fps=Rate(value=150.0, interval=(148.0, 152.0)),
        )
        for index, name in enumerate(variants)
    }
    return StreamResult(
        target=target,
        variants=frames,
        validity=Validity(),
        source="street.y4m",
        source_sha256=DIGEST,
        frame_size=(640, 480),
        samples=SAMPLES,
        rounds=ROUNDS,
        excluded_rounds=(),
        slice_frames=10,
        queue_frames=2,
        boot_id="a boot",
    )


def make_cascade(target: str, variants: Sequence[str]) -> CascadeResult:
    both = {
        name: VariantCascade(
            steps=make_steps(CASCADE_STEPS, SHRINKING**index),
            fps=Rate(value=50.0, interval=(49.0, 51.0)),
            scores={"map50": 0.5},
            drops={"map50": (0.0, (-0.01, 0.01))},
            objects=10,
            size_bytes=1000,
            size_ratio=1.0,
            p50_ratio=1.0,
            records=Report(sha256=DIGEST, size_bytes=1),
        )
        for index, name in enumerate(variants)
    }
    return CascadeResult(
        target=target,
        variants=both,
        validity=Validity(),
        samples=SAMPLES,
        rounds=ROUNDS,
        excluded_rounds=(),
        boot_id="a boot",
    )


def make_steps(steps: Sequence[str], share: float) -> dict[str, LatencySummary]:
    """Each step takes a millisecond more than the one before it."""
    medians = {step: share * (index + 1) for index, step in enumerate(steps)}
    return {
        step: LatencySummary(
            count=100, timed_s=1.0, mean_ms=ms, stdev_ms=0.1, p50_ms=ms, p90_ms=ms, p95_ms=ms, p99_ms=None
        )
        for step, ms in {**medians, END_TO_END: sum(medians.values())}.items()
    }


def store_run(run: RunMaterial, recipe: object, tracker: Tracker, store: Store) -> str:
    """Records the run as a flow does, and returns its number in MLflow."""
    run_id = tracker.start_run(run.recipe, run_name=run.name)
    tracker.log_text(run_id, "recipe.yaml", yaml_of(recipe))
    tracker.log_json(run_id, "environment.json", dict(run.environment))
    for name, target in run.targets.items():
        store_target(tracker, store, run_id, name, target)
    for row in run.rows:
        store_row(tracker, store, run_id, row)
    for one in run.calibration:
        store_calibration(tracker, store, run_id, one)
    result = RunResult(
        run_id=run_id,
        exit_code=gates_exit_code(run.rows),
        rows=tuple(run.rows),
        task_metrics=tuple(run.metrics),
    )
    tracker.log_json(run_id, RESULT_PATH, result.model_dump(mode="json"))
    tracker.share_view(run_id, [metric.name for metric in run.metrics])
    tracker.finish(run_id, "FINISHED")
    return run_id


def store_target(tracker: Tracker, store: Store, run_id: str, name: str, target: TargetMaterial) -> None:
    folder = f"targets/{name}"
    documents = {
        "target": target.info, "benchmark": target.benchmark, "stream": target.stream, "cascade": target.cascade
    }  # fmt: skip
    for path, document in documents.items():
        tracker.log_json(run_id, f"{folder}/{path}.json", document.model_dump(mode="json"))
    with store.scratch() as scratch:
        arrays = {}
        for variant, values in target.latencies_ms.items():
            arrays[f"{variant}.latency_ns"] = (values * NS_PER_MS).round().astype(np.int64)
            arrays[f"{variant}.round"] = np.sort(np.arange(len(values)) % ROUNDS).astype(np.int32)
        save_file(arrays, scratch / "samples")
        handle = store.add(Tensors, scratch / "samples")
    tracker.log_files(run_id, {f"{folder}/samples.safetensors": (handle, store.open(handle))})


def store_calibration(tracker: Tracker, store: Store, run_id: str, found: CalibrationMaterial) -> None:
    document = {
        "set": found.name,
        "sha256": found.sha256,
        "samples": found.samples,
        "scenes": dict(found.scenes),
        "scenes_only_in_evaluation": list(found.only_in_evaluation),
    }
    handle = store.add_json(document)
    tracker.log_files(run_id, {f"calibration/{found.name}.json": (handle, store.open(handle))})


def store_row(tracker: Tracker, store: Store, run_id: str, row: VariantResult) -> None:
    judged = {"validity": validity_of([row]), "gate": worst_gate([row])}
    tags = {"variant": row.variant, "target": row.target, "board": row.board, **judged}
    child = tracker.start_child(run_id, f"{row.variant} on {row.target}", {}, tags)
    tracker.log_metrics(child, row.metrics)
    passport = {"platform": {"engine": "onnxruntime", "engine_version": "1.31.1"}}
    kinds = {
        "checkpoint.safetensors": (Checkpoint, {}),
        "model.onnx": (OnnxModel, {}),
        "engine.engine": (Engine, passport),
        "records.json": (Report, {}),
    }
    files = {}
    for path, (kind, metadata) in kinds.items():
        with store.scratch() as scratch:
            (scratch / "file").write_text(f"{path} of {row.variant}")
            handle = store.add(kind, scratch / "file", metadata=metadata)
        files[path] = (handle, store.open(handle))
    tracker.log_files(child, files)
    tracker.finish(child, "FINISHED")
