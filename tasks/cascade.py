"""Stage ``cascade``: a detector and a classifier of what it finds, as one unit with two engines on a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.numpy import load_file

from jetway.configs.schema import BenchmarkConfig, CascadeConfig, StreamConfig, Target
from jetway.tasks.artifacts import Clip, Engine, Tensors
from jetway.tasks.cascade_result import STEPS, CascadeResult, VariantCascade
from jetway.tasks.cascade_unit import unit_settings
from jetway.tasks.clip import evaluation_frames, frame_processing_of
from jetway.tasks.errors import ConfigError, MeasurementError
from jetway.tasks.frames import Boxes, Classes
from jetway.tasks.measurement import LatencySummary
from jetway.tasks.remote import RETRIES, RETRY_DELAYS_S, is_unreachable, pull_file, push_handle, relay
from jetway.tasks.results import Validity
from jetway.tasks.stage import StageContext, stage_seed
from jetway.tasks.statistics import Resampled, paired_drop
from jetway.tasks.stream_result import END_TO_END, Rate, summarize_steps
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.workload import Record, Workload

# Share of the time limit after which a session closes with what it has.
SESSION_SHARE = 0.8
WARMUP_FRAMES = 5

Engines = Mapping[str, Engine]
Arrays = Mapping[str, NDArray[Any]]


def check_cascade(detector: Workload, classifier: Workload) -> None:
    """Raises ConfigError when the two cannot be one unit."""
    found, named = (frame_processing_of(workload).results for workload in (detector, classifier))
    if not isinstance(found, Boxes) or not isinstance(named, Classes):
        raise ConfigError(
            f"cascade: {type(detector).__name__} gives {found.kind} and {type(classifier).__name__} {named.kind}. "
            "The recipe's own workload must declare boxes in frame_processing(), the classifier's classes."
        )
    if not hasattr(detector, "score_boxes"):
        raise ConfigError(
            f"cascade: {type(detector).__name__} has no score_boxes(boxes, scores, labels, target), which scores what "
            "both found together. Write it beside score_sample."
        )


def cascade_engines(
    context: StageContext,
    classifier: Workload,
    session: TargetSession,
    detectors: Engines,
    classifiers: Engines,
    config: CascadeConfig,
    benchmark: BenchmarkConfig,
) -> CascadeResult:
    """Runs the detector's evaluation data through both engines of each variant, and scores what came of it.

    ``context`` is the detector's. Raises MeasurementError when time ran out before every sample was seen.
    """
    stage, count = stage_name(session.target.name), sample_count(context.workload, config)
    clip = make_frames(context, count)
    request = _request(context, classifier, session, detectors, classifiers, config, benchmark)
    result = session.run_job(
        "cascade",
        {**request, "source": push_handle(context, session, clip, stage=stage), "frames": count},
        timeout_s=config.timeout_s,
        on_progress=relay(context.progress, stage),
    )
    if result["frames"] < count:
        raise MeasurementError(
            f"{session.target.name}: there was time for {result['frames']} of {count} samples of the cascade. Raise "
            "cascade.timeout_s, or lower cascade.samples."
        )
    found = load_file(context.store.open(_pulled(context, session, result["results"])))
    samples = _pulled(context, session, result["samples"])
    sizes = {name: detectors[name].size_bytes + classifiers[name].size_bytes for name in detectors}
    reasons = tuple(f"cascade: {reason}" for reason in result["reasons"])
    return CascadeResult(
        target=session.target.name,
        variants=_measured(context, samples, found, result, sizes),
        validity=Validity(valid=not reasons, reasons=reasons),
        simulated=result["simulated"],
        samples=samples,
        rounds=result["rounds"],
        excluded_rounds=result["excluded_rounds"],
        boot_id=result["boot_id"],
    )


def stage_name(target: str) -> str:
    return f"cascade on {target}"


def sample_count(workload: Workload, config: CascadeConfig) -> int:
    total = len(workload.evaluation_data())  # type: ignore[arg-type]
    return min(total, config.samples or total)


def make_frames(context: StageContext, count: int) -> Clip:
    """The detector's evaluation data as frames."""
    with context.store.scratch() as folder:
        path = folder / "frames.npy"
        np.save(path, evaluation_frames(context.workload, StreamConfig(clip_frames=count)))
        return context.store.add(Clip, path, metadata={"source": "evaluation data"})


def _request(
    context: StageContext,
    classifier: Workload,
    session: TargetSession,
    detectors: Engines,
    classifiers: Engines,
    config: CascadeConfig,
    benchmark: BenchmarkConfig,
) -> dict[str, Any]:
    target = session.target
    return {
        **unit_settings(context.workload, classifier, config),
        "pairs": [
            {"name": name, "detector": _entry(detectors[name]), "classifier": _entry(classifiers[name])}
            for name in detectors
        ],
        "warmup_frames": WARMUP_FRAMES,
        "queue_frames": 1,
        "telemetry": benchmark.telemetry,
        "power_mode": benchmark.power_mode or target.power_mode,
        "lock_clocks": target.lock_clocks if benchmark.lock_clocks is None else benchmark.lock_clocks,
        "max_duration_s": config.timeout_s * SESSION_SHARE,
    }


def _entry(engine: Engine) -> dict[str, str]:
    return {"path": engine.metadata["remote_path"], "sha256": engine.sha256}


def _pulled(context: StageContext, session: TargetSession, remote: Mapping[str, Any]) -> Tensors:
    with context.store.scratch() as folder:
        path: Path = folder / "pulled.safetensors"
        stage = stage_name(session.target.name)
        pull_file(context, session, remote["path"], path, sha256=remote["sha256"], stage=stage)
        return context.store.add(Tensors, path)


def _measured(
    context: StageContext,
    samples: Tensors,
    found: Arrays,
    result: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> dict[str, VariantCascade]:
    """Each variant beside the first. ``sizes`` are the bytes of both engines."""
    arrays, seed = load_file(context.store.open(samples)), stage_seed(context.seed, "cascade")
    times = {
        name: summarize_steps(arrays, name, STEPS, result["excluded_rounds"], seed=seed) for name in sizes
    }
    records = {
        name: Resampled(
            score(context.workload, found, name, result["frames"]), context.workload.summarize, seed=seed
        )
        for name in sizes
    }
    first = next(iter(sizes))
    return {
        name: VariantCascade(
            steps=steps,
            fps=Rate.of(result["slice_frames"], seconds, seed),
            scores=dict(records[name].summary),
            drops=_drops(context.workload, records[first], records[name]),
            objects=len(found[f"{name}.labels"]),
            size_bytes=sizes[name],
            size_ratio=sizes[name] / sizes[first],
            p50_ratio=_median_ms(steps) / _median_ms(times[first][0]),
            records=context.store.add_json(records[name].records),
        )
        for name, (steps, seconds) in times.items()
    }


def _median_ms(steps: Mapping[str, LatencySummary]) -> float:
    median_ms = steps[END_TO_END].p50_ms
    assert median_ms is not None, "twelve rounds support a median"
    return median_ms


def score(workload: Workload, found: Arrays, name: str, count: int) -> list[Record]:
    """A record for each sample, of the boxes with the classifier's labels."""
    data, records = workload.evaluation_data(), []
    for index in range(count):
        own = found[f"{name}.frame"] == index
        boxes, scores, labels = (found[f"{name}.{key}"][own] for key in ("boxes", "scores", "labels"))
        records.append(workload.score_boxes(boxes, scores, labels, data[index][1]))  # type: ignore[attr-defined]
    return records


def _drops(
    workload: Workload, baseline: Resampled, records: Resampled
) -> dict[str, tuple[float, tuple[float, float]]]:
    return {
        metric.name: paired_drop(baseline, records, metric.name, higher_is_better=metric.higher_is_better)
        for metric in workload.metrics
    }


@task(
    name="cascade",
    task_run_name="cascade on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def cascade(
    context: StageContext,
    classifier: StageContext,
    target: Target,
    detectors: dict[str, Engine],
    classifiers: dict[str, Engine],
    config: CascadeConfig,
    benchmark: BenchmarkConfig,
) -> CascadeResult:
    with context.timed(stage_name(target.name)), open_target(target) as session:
        return cascade_engines(
            context, classifier.workload, session, detectors, classifiers, config, benchmark
        )
