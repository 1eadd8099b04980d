"""Calibrate: a calibration set as an artifact: what is in it, what it covers, and that it is no evaluation data.

A set that shares samples with the evaluation data would make the accuracy of int8 look better than it is, so it is
refused, by the content of the samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch.utils.data import Dataset

from jetway.configs.schema import Precision, Recipe, Section
from jetway.tasks.artifacts import StageOutput
from jetway.tasks.calibration import calibration_set, sample_sha256
from jetway.tasks.errors import QuantizationError
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.training import users_code
from jetway.tasks.workload import Sample, Workload

_LISTED = 5


class CalibrationSetSection(Section):
    """Which set, how many of its samples are used, and how often it was asked to be made anew."""

    calibration_set: str
    calibration_samples: int
    revision: int


def describe_calibration_set(context: StageContext, section: CalibrationSetSection) -> StageOutput:
    """A report with the set's digest, the digest of each sample, and how many samples each scene has.

    Raises ConfigError for an unknown set, QuantizationError for an empty one and for one that shares samples with
    the evaluation data.
    """
    workload = context.workload
    data = calibration_set(workload, section.calibration_set)
    used = range(min(section.calibration_samples, len(data)))  # type: ignore[arg-type]
    with users_code(workload, "its calibration data"):
        samples = [data[index] for index in used]
        digests = [sample_sha256(inputs) for inputs, _ in samples]
        scenes = _scenes(workload, samples)
    with users_code(workload, "its evaluation data"):
        evaluated, others = _evaluation(workload)
    _refuse_overlap(section.calibration_set, digests, evaluated)
    document = {
        "schema_version": 1,
        "set": section.calibration_set,
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "samples": len(digests),
        "distinct_samples": len(set(digests)),
        "scenes": dict(sorted(scenes.items())),
        "scenes_only_in_evaluation": sorted(others.keys() - scenes.keys()),
        "sample_sha256": digests,
    }
    metrics = {
        "samples": float(len(digests)),
        "scene_coverage_ratio": len(others.keys() & scenes.keys()) / max(1, len(others)),
    }
    report = context.store.add_json(document)
    return StageOutput(handle=report, files={f"{section.calibration_set}.json": report}, metrics=metrics)


@task(name="calibration set", cache_policy=NO_CACHE, persist_result=False)
def calibrate(context: StageContext, section: CalibrationSetSection) -> StageOutput:
    return run_stage(
        context,
        "calibration set",
        lambda ctx: describe_calibration_set(ctx, section),
        inputs=[],
        section=section,
    )


def calibration_sets(recipe: Recipe) -> list[CalibrationSetSection]:
    """The sets that the variants of a recipe take ranges from."""
    precisions = {variant.precision for variant in recipe.variants}
    used = []
    if any(precision.has_quantizers for precision in precisions):
        used.append((recipe.qat.calibration_set, recipe.qat.calibration_samples))
    if Precision.INT8_CALIBRATED in precisions:
        own = recipe.tensorrt.calibration
        used.append((own.calibration_set, own.samples))
    revision = recipe.qat.revision
    return [
        CalibrationSetSection(calibration_set=name, calibration_samples=samples, revision=revision)
        for name, samples in dict.fromkeys(used)
    ]


def _evaluation(workload: Workload) -> tuple[dict[str, int], Counter[str]]:
    """Where each evaluation sample is, by digest, and how many samples each scene has."""
    data: Dataset[Sample] = workload.evaluation_data()
    places: dict[str, int] = {}
    scenes: Counter[str] = Counter()
    for index in range(len(data)):  # type: ignore[arg-type]
        inputs, target = data[index]
        places.setdefault(sample_sha256(inputs), index)
        scenes[workload.scene_of(inputs, target)] += 1
    return places, scenes


def _scenes(workload: Workload, samples: Iterable[Sample]) -> Counter[str]:
    return Counter(workload.scene_of(inputs, target) for inputs, target in samples)


def _refuse_overlap(name: str, digests: list[str], evaluated: Mapping[str, int]) -> None:
    shared: list[Any] = [
        (place, evaluated[digest]) for place, digest in enumerate(digests) if digest in evaluated
    ]
    if shared:
        some = ", ".join(f"{place} is evaluation sample {other}" for place, other in shared[:_LISTED])
        raise QuantizationError(
            f"The calibration set {name!r} shares {len(shared)} of its {len(digests)} samples with the evaluation "
            f"data: {some}. Ranges from there make int8 look better than it is: take samples from elsewhere."
        )
