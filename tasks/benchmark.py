"""Stage ``benchmark``: every variant of a target in one session, in interleaved slices, beside a canary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from jetway.configs.schema import BenchmarkConfig, BuildConfig, Target, TensorRtConfig
from jetway.tasks.artifacts import Engine, Tensors
from jetway.tasks.canary import canary_inputs, canary_onnx
from jetway.tasks.measurement import (
    BenchmarkResult,
    LatencySummary,
    MachineState,
    measure_variants,
    read_samples,
)
from jetway.tasks.passes import InFlight, PowerPass, Telemetry
from jetway.tasks.remote import (
    RETRIES,
    RETRY_DELAYS_S,
    build_on_target,
    example_inputs,
    is_unreachable,
    pull_file,
    push_handle,
    relay,
)
from jetway.tasks.results import Validity
from jetway.tasks.stage import StageContext, stage_seed
from jetway.tasks.target.session import TargetSession, open_target

P = TypeVar("P", bound=BaseModel)

CANARY = "canary"
# Share of the time limit after which a session closes with what it has, and says so, rather than be killed.
SESSION_SHARE = 0.8


def benchmark_engines(
    context: StageContext,
    session: TargetSession,
    engines: Mapping[str, Engine],
    config: BenchmarkConfig,
) -> BenchmarkResult:
    """Measures the engines, by variant name, side by side; ratios refer to the first.

    Raises TargetMismatchError for an engine that was built on another machine. A session that drifted or ran
    out of time is returned with the reasons in its validity, not raised.
    """
    request = _request(context, session, engines, config)
    result = session.run_job(
        "benchmark",
        request,
        timeout_s=config.timeout_s,
        on_progress=relay(context.progress, stage_name(session.target.name)),
    )
    parents = tuple(engine.sha256 for engine in engines.values())
    samples = _pull(context, session, result["samples"], parents)
    return _measure(context, session, tuple(engines), samples, result)


def stage_name(target: str) -> str:
    return f"benchmark on {target}"


def _request(
    context: StageContext, session: TargetSession, engines: Mapping[str, Engine], config: BenchmarkConfig
) -> dict[str, Any]:
    inputs = push_handle(context, session, example_inputs(context), stage=stage_name(session.target.name))
    threads = next(iter(engines.values())).metadata["threads"]
    return {
        **config.model_dump(mode="json", exclude={"timeout_s", "stream"}),
        **session.target.power_settings(config),
        "engines": [_entry(engine, inputs, name) for name, engine in engines.items()],
        "canary": _canary_entry(context, session, threads),
        "max_duration_s": config.timeout_s * SESSION_SHARE,
        "seed": stage_seed(context.seed, "benchmark"),
    }


def _entry(engine: Engine, remote_inputs: str, name: str) -> dict[str, str]:
    return {
        "name": name,
        "path": engine.metadata["remote_path"],
        "sha256": engine.sha256,
        "inputs": remote_inputs,
    }


def _canary_entry(context: StageContext, session: TargetSession, threads: int) -> dict[str, str]:
    inputs, stage = canary_inputs(context.store), stage_name(session.target.name)
    engine = build_on_target(
        context,
        session,
        canary_onnx(context.store),
        inputs,
        BuildConfig(threads=threads),
        TensorRtConfig(),
        session.target.own_backend,
        stage=stage,
    )
    return _entry(engine, push_handle(context, session, inputs, stage=stage), CANARY)


def _pull(
    context: StageContext, session: TargetSession, remote: Mapping[str, Any], parents: tuple[str, ...] = ()
) -> Tensors:
    """A file of arrays from the target, kept in the store."""
    with context.store.scratch() as folder:
        path = folder / "pulled.safetensors"
        stage = stage_name(session.target.name)
        pull_file(context, session, remote["path"], path, sha256=remote["sha256"], stage=stage)
        return context.store.add(Tensors, path, parents=parents)


def _with_samples(
    model: type[P], context: StageContext, session: TargetSession, told: Mapping[str, Any] | None
) -> P | None:
    """What a pass told of its sensors, with the file of their samples; None without one."""
    if not told or not told.get("samples"):
        return None
    return model.model_validate({**told, "samples": _pull(context, session, told["samples"])})


def _measure(
    context: StageContext,
    session: TargetSession,
    names: tuple[str, ...],
    handle: Tensors,
    result: Mapping[str, Any],
) -> BenchmarkResult:
    excluded = tuple(result["excluded_rounds"])
    samples = read_samples(context.store.open(handle), (*names, CANARY), excluded)
    batch_size = next(iter(context.workload.example_inputs().values())).shape[0]
    reasons = tuple(result["reasons"])
    return BenchmarkResult(
        target=session.target.name,
        variants=measure_variants(
            samples,
            names,
            memory=result["memory"],
            drift_ratios=result["drift_ratios"],
            batch_size=batch_size,
            seed=result["seed"],
        ),
        validity=Validity(valid=not reasons, reasons=reasons),
        samples=handle,
        canary=LatencySummary.of(*samples[CANARY]),
        canary_drift_ratio=result["drift_ratios"][CANARY],
        rounds=result["rounds"],
        excluded_rounds=excluded,
        extensions=result["extensions"],
        slice_s=result["slice_s"],
        seed=result["seed"],
        machine_before=MachineState.model_validate(result["machine_before"]),
        machine_after=MachineState.model_validate(result["machine_after"]),
        boot_id=result["boot_id"],
        simulated=result.get("simulated", False),
        batch_size=batch_size,
        in_flight={
            name: InFlight.model_validate(found) for name, found in (result.get("throughput") or {}).items()
        },
        power=_with_samples(PowerPass, context, session, result.get("power")),
        power_mode=result.get("power_mode"),
        trtexec=result.get("trtexec") or {},
        left_out=result.get("left_out") or {},
        layers=result.get("layers") or {},
        telemetry=_with_samples(Telemetry, context, session, result.get("telemetry")),
    )


@task(
    name="benchmark",
    task_run_name="benchmark on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def benchmark(
    context: StageContext, target: Target, engines: dict[str, Engine], config: BenchmarkConfig
) -> BenchmarkResult:
    with context.timed(stage_name(target.name)), open_target(target) as session:
        return benchmark_engines(context, session, engines, config)
