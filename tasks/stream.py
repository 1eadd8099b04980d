"""Stage ``stream``: frames through capture, preprocessing, inference and postprocessing on a target, timed by step.

All variants are measured, not the winner alone: a smaller network moves the limit from inference to the steps
around it, and that shows only beside the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import BenchmarkConfig, StreamConfig, Target
from jetway.tasks.artifacts import Clip, Engine, Tensors
from jetway.tasks.clip import frame_processing_of, make_clip
from jetway.tasks.remote import (
    RETRIES,
    RETRY_DELAYS_S,
    is_unreachable,
    pull_file,
    push_handle,
    relay,
)
from jetway.tasks.results import Validity
from jetway.tasks.stage import StageContext, stage_seed
from jetway.tasks.stream_result import StreamResult, measure_streams
from jetway.tasks.target.session import TargetSession, open_target

# Share of the time limit after which a session closes with what it has, and says so, rather than be killed.
SESSION_SHARE = 0.8


def stream_engines(
    context: StageContext,
    session: TargetSession,
    engines: Mapping[str, Engine],
    config: BenchmarkConfig,
    source: Path | None = None,
) -> StreamResult:
    """Sends frames of ``source``, or of the evaluation data, through every engine, in turns.

    Raises TargetMismatchError where the target lacks what decodes them. A session that others disturbed is returned
    with the reasons in its validity.
    """
    assert config.stream is not None
    clip = make_clip(context.store, context.workload, config.stream, source)
    stage = stage_name(session.target.name)
    result = session.run_job(
        "stream",
        _request(context, session, engines, config, clip),
        timeout_s=config.stream.timeout_s,
        on_progress=relay(context.progress, stage),
    )
    with context.store.scratch() as folder:
        path = folder / "samples.safetensors"
        remote = result["samples"]
        pull_file(context, session, remote["path"], path, sha256=remote["sha256"], stage=stage)
        parents = tuple(engine.sha256 for engine in engines.values())
        samples = context.store.add(Tensors, path, parents=parents)
    return _measured(context, session, tuple(engines), config.stream, clip, samples, result)


def stage_name(target: str) -> str:
    return f"stream on {target}"


def _request(
    context: StageContext,
    session: TargetSession,
    engines: Mapping[str, Engine],
    config: BenchmarkConfig,
    clip: Clip,
) -> dict[str, Any]:
    assert config.stream is not None
    frames, target = frame_processing_of(context.workload), session.target
    return {
        "engines": [
            {"name": name, "path": engine.metadata["remote_path"], "sha256": engine.sha256}
            for name, engine in engines.items()
        ],
        "source": push_handle(context, session, clip, stage=stage_name(target.name)),
        **frames.model_dump(mode="json"),
        **config.stream.model_dump(include={"frames", "warmup_frames", "queue_frames"}),
        "telemetry": config.telemetry,
        "power_mode": config.power_mode or target.power_mode,
        "lock_clocks": target.lock_clocks if config.lock_clocks is None else config.lock_clocks,
        "max_duration_s": config.stream.timeout_s * SESSION_SHARE,
    }


def _measured(
    context: StageContext,
    session: TargetSession,
    names: tuple[str, ...],
    config: StreamConfig,
    clip: Clip,
    samples: Tensors,
    result: Mapping[str, Any],
) -> StreamResult:
    reasons = tuple(f"frames: {reason}" for reason in result["reasons"])
    seed = stage_seed(context.seed, "stream")
    return StreamResult(
        target=session.target.name,
        variants=measure_streams(context.store.open(samples), names, result, seed=seed),
        validity=Validity(valid=not reasons, reasons=reasons),
        simulated=result["simulated"],
        source=clip.metadata["source"],
        source_sha256=clip.sha256,
        frame_size=result["frame_size"],
        samples=samples,
        rounds=result["rounds"],
        excluded_rounds=result["excluded_rounds"],
        slice_frames=result["slice_frames"],
        queue_frames=config.queue_frames,
        boot_id=result["boot_id"],
    )


@task(
    name="stream",
    task_run_name="stream on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def stream(
    context: StageContext,
    target: Target,
    engines: dict[str, Engine],
    config: BenchmarkConfig,
    source: Path | None,
) -> StreamResult:
    with context.timed(stage_name(target.name)), open_target(target) as session:
        return stream_engines(context, session, engines, config, source)
