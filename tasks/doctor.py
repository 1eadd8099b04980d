"""What ``jetway doctor`` judges: a target's state, its precisions on tiny networks, and its own tool's figures.

The judgements are pure; the flow asks the target. The report is one file to attach to an issue, so it names neither
people nor machines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jetway.configs.schema import (
    DlaConfig,
    ExportConfig,
    Precision,
    Recipe,
    Target,
    TensorRtConfig,
    Variant,
    WorkloadConfig,
)
from jetway.tasks.artifacts import SCHEMA_VERSION, Engine
from jetway.tasks.checks import Check, all_passed, checks_markdown, judged, skipped, summary
from jetway.tasks.contract import contract_of
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.requirements import engine_problems
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.target_state import simulated_checks

#: The oldest that int8 has a form in, which every engine takes.
OPSET = 13
#: Largest error as a share of the output's largest magnitude. int8 is held against what its Q/DQ say, or, where
#: TensorRT itself calibrates, against float.
TOLERANCES = {
    Precision.FP32: 1e-3,
    Precision.FP16: 0.01,
    Precision.BF16: 0.05,
    Precision.INT8_PTQ: 0.05,
    Precision.INT8_CALIBRATED: 0.10,
}
#: How far our median of the GPU's compute may be from trtexec's, on networks that take microseconds.
TRTEXEC_TOLERANCE = 0.25


@dataclass(frozen=True)
class Case:
    """A precision to try, where there is a choice also on which part of the chip."""

    name: str
    precision: Precision
    tensorrt: TensorRtConfig = field(default_factory=TensorRtConfig)

    def recipe(self) -> Recipe:
        baseline = Variant.model_validate("baseline-fp32")
        variant = Variant.model_validate(f"baseline-{self.precision}")
        return Recipe(
            name="doctor",
            workload=WorkloadConfig(class_path="jetway.tasks.tiny_networks:TinyWorkload"),
            export=ExportConfig(opset=OPSET),
            tensorrt=self.tensorrt,
            variants=tuple(dict.fromkeys((baseline, variant))),
        )


def cases_for(info: TargetInfo) -> list[Case]:
    """Every precision that there is a form of, fp32 first, and the DLA where the target has one."""
    cases = [Case(str(precision), precision) for precision in TOLERANCES]
    if contract_of(info).has_dla:
        on_dla = TensorRtConfig(dla=DlaConfig(core=0))
        cases += [
            Case(f"{precision} on DLA", precision, on_dla)
            for precision in (Precision.FP16, Precision.INT8_CALIBRATED)
        ]
    return cases


def possible_cases(target: Target, info: TargetInfo) -> tuple[list[Case], list[Check]]:
    """The cases that the target can run by its contract, and a line for each that it cannot.

    fp32 is the engine itself: what stands in its way fails the check, and leaves nothing to try.
    """
    fp32, *others = cases_for(info)
    missing = list(engine_problems(fp32.recipe(), target, info))
    if missing:
        return [], [judged("engine", False, " ".join(missing))]
    possible, refused = [fp32], []
    for case in others:
        problems = list(engine_problems(case.recipe(), target, info))
        if problems:
            own = f"variants: baseline-{case.precision}: "
            refused.append(skipped(case.name, " ".join(problem.removeprefix(own) for problem in problems)))
        else:
            possible.append(case)
    return possible, refused


def target_checks(target: Target, info: TargetInfo) -> Iterator[Check]:
    """What the probe said."""
    yield judged(
        "connection", True, f"Python {info.python} on {info.machine}, {info.os}, Linux {info.kernel}"
    )
    engine = info.engines[target.engine]
    others = [f"{name} {other.version}" for name, other in info.engines.items() if other.available]
    if engine.available:
        yield judged(
            "engine",
            True,
            f"{target.engine} {engine.version}; all that is there: {', '.join(others)}",
            double=engine.double,
        )
    if info.power_problem:
        yield judged("power settings", False, info.power_problem)
    yield from simulated_checks(info)


def precision_check(name: str, precision: Precision, error_ratio: float, engine: Engine) -> Check:
    """Whether the target's outputs are this host's, within what the precision allows."""
    tolerance = TOLERANCES[precision]
    facts = engine.metadata
    integer = facts.get("integer_macs_ratio")
    kernels = f", {integer:.0%} of the MACs in integers" if precision.is_int8 and integer is not None else ""
    evidence = f"largest error {error_ratio:.2g} of the largest output, {tolerance:g} allowed{kernels}"
    return judged(
        name, error_ratio <= tolerance, evidence,
        error_ratio=error_ratio, tolerance=tolerance, build_s=facts["build_s"], engine_bytes=engine.size_bytes,
    )  # fmt: skip


def benchmark_check(result: BenchmarkResult) -> Check:
    """That a session runs here; what a few seconds of it say of the speed is no more than a hint."""
    medians = {name: measured.latency.p50_ms for name, measured in result.variants.items()}
    parts = [f"{name} {p50_ms:.4g} ms" for name, p50_ms in medians.items() if p50_ms is not None]
    doubts = f"; not valid as a measurement: {'; '.join(result.validity.reasons)}"
    evidence = f"p50 {', '.join(parts)} in {result.rounds} rounds{'' if result.validity.valid else doubts}"
    return judged("benchmark", bool(parts), evidence, latency_ms_p50=medians)


def trtexec_checks(result: BenchmarkResult) -> Iterator[Check]:
    """Our medians of the GPU's compute against those of the target's own trtexec."""
    if not result.trtexec:
        yield skipped("trtexec", "it is not there, or the engine is none of TensorRT's")
    for name, theirs in result.trtexec.items():
        yield trtexec_check(f"trtexec {name}", theirs, result.metrics(name)["trtexec_gpu_compute_ratio"])


def trtexec_check(name: str, theirs: Mapping[str, Any], ratio: float | None) -> Check:
    if ratio is None:
        return judged(name, False, str(theirs.get("failed") or "it told no time of the GPU's compute"))
    evidence = f"our GPU compute is {ratio:.3f} of trtexec's, {TRTEXEC_TOLERANCE:.0%} apart allowed"
    return judged(name, abs(ratio - 1) <= TRTEXEC_TOLERANCE, evidence, ratio=ratio)


# Addresses of either family, of network cards, and ids of GPUs.
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_GPU_ID = re.compile(r"GPU-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]+)*")
_HOME = re.compile(r"/(?:home|Users)/[^/\s'\"]+|/root(?=[/\s'\"]|$)")


class Anonymizer:
    """Takes names and addresses out of texts. ``words`` are those to hide, ``versions`` what only looks like one."""

    def __init__(self, words: Mapping[str, str], versions: Iterable[str]) -> None:
        ordered = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in ordered)
        self._words = re.compile(pattern) if pattern else None
        self._names = dict(words)
        self._versions = frozenset(versions)

    def text(self, text: str) -> str:
        if self._words:
            text = self._words.sub(lambda found: self._names[found[0]], text)
        for pattern, name in ((_IPV6, "ADDRESS"), (_GPU_ID, "GPU-ID"), (_HOME, "~")):
            text = pattern.sub(name, text)
        return _IPV4.sub(lambda found: found[0] if found[0] in self._versions else "ADDRESS", text)

    def value(self, value: Any) -> Any:
        """The same for every text in a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value


def target_facts(target: Target, info: TargetInfo) -> dict[str, Any]:
    """What a reader of the report must know of the target; nothing that tells one machine from its like."""
    facts = info.model_dump(mode="json", exclude={"hostname", "boot_id", "accelerators"})
    contract = contract_of(info)
    return {
        **facts,
        "engine": str(target.engine),
        "providers": [str(provider) for provider in target.providers],
        "jetpack": contract.jetpack.name if contract.jetpack else None,
        "dla_cores": contract.dla_cores,
    }


def report_markdown(checks: Iterable[Check], facts: Mapping[str, Any], anonymizer: Anonymizer) -> str:
    """The report: what came out, the checks as a table, and everything again as JSON."""
    checks = list(checks)
    document = anonymizer.value(
        {
            "schema_version": SCHEMA_VERSION,
            "passed": all_passed(checks),
            **facts,
            "checks": [check.model_dump(mode="json") for check in checks],
        }
    )
    clean = [Check.model_validate(check) for check in document["checks"]]
    return (
        f"# jetway doctor: {summary(clean)}\n\n{checks_markdown(clean)}\n<details><summary>JSON</summary>\n\n"
        f"```json\n{json.dumps(document, indent=1, allow_nan=False)}\n```\n\n</details>\n"
    )
