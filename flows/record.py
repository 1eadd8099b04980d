"""From measurements to the run's record: rows, MLflow child runs, the description, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from pydantic import BaseModel, ConfigDict

from jetway.configs.schema import Target, Variant
from jetway.flows.pipeline import Pipeline
from jetway.tasks.artifacts import Checkpoint, Engine, OnnxModel, StageOutput
from jetway.tasks.cascade_result import CascadeResult, VariantCascade, cascade_markdown
from jetway.tasks.cascade_unit import Behind
from jetway.tasks.errors import FleetError, JetwayError
from jetway.tasks.gates import worst_exit_code
from jetway.tasks.int8_report import int8_reports, report_markdown
from jetway.tasks.ladder import Rung
from jetway.tasks.layer_table import layers_csv
from jetway.tasks.measurement import BenchmarkResult, Evaluation
from jetway.tasks.metrics import Metric
from jetway.tasks.passes import dla_layers_ratio, provider_notes, read_series
from jetway.tasks.results import (
    TargetOutcome,
    TargetStatus,
    Validity,
    VariantResult,
    Verdict,
    drop_name,
    failed,
    without_result,
)
from jetway.tasks.stage import stage_seed
from jetway.tasks.statistics import Resampled, paired_drop
from jetway.tasks.stream_result import StreamResult, VariantStream, stream_csv, stream_markdown
from jetway.tasks.table import outcome_line, stage_table_markdown
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.tracking.values import flat_params

#: The run's result as JSON, among its artifacts.
RESULT_PATH = "result.json"
#: The report for people, among them too.
REPORT_PATH = "report.html"
#: Begins the line of a run's description that leads to the report.
REPORT_LINK = "[The report]"
#: Begins the paragraph that leads to what the run was compared with, the newest first.
COMPARED = "Compared:"
COMPARISONS_SHOWN = 5
#: Ends the name of a run with figures that are no device's, as MLflow's table of runs shows names, not tags.
SIMULATED = " (simulated)"


@dataclass(frozen=True)
class Network:
    """A checkpoint and what it costs: quantization changes neither count."""

    checkpoint: Checkpoint
    params: float
    macs: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, counted: StageOutput) -> Network:
        return cls(checkpoint, counted.metrics["params"], counted.metrics["macs"])

    def quantized(self, checkpoint: Checkpoint) -> Network:
        return replace(self, checkpoint=checkpoint)


@dataclass(frozen=True)
class Measured:
    """What one target gave: engines and evaluations by variant, and the session that timed them."""

    target: Target
    info: TargetInfo
    models: Mapping[str, OnnxModel]
    engines: Mapping[str, Engine]
    benchmark: BenchmarkResult
    stream: StreamResult | None
    cascade: CascadeResult | None = field(default=None, kw_only=True)
    #: The classifier of each variant of a cascade.
    behind: Mapping[str, Behind] = field(default_factory=dict, kw_only=True)
    evaluations: Mapping[str, Evaluation]
    #: One a variant, not judged yet.
    rows: tuple[VariantResult, ...] = field(default=(), kw_only=True)

    def of(self, variant: str) -> list[VariantStream | VariantCascade]:
        """What was measured of a variant in sessions beside the benchmark's."""
        streamed = [self.stream.variants[variant]] if self.stream else []
        return [*streamed, *([self.cascade.variants[variant]] if self.cascade else [])]


@dataclass(frozen=True)
class Attempt:
    """A recipe once on its targets: what is recorded of it, and the error of those without a result, if any."""

    result: RunResult
    measured: Sequence[Measured]
    error: JetwayError | None

    def rows_of(self, target: str) -> list[VariantResult]:
        return [row for row in self.result.rows if row.target == target]

    def canary_ms(self, target: str) -> float | None:
        """Median of the canary in the target's session."""
        return next(one.benchmark.canary.p50_ms for one in self.measured if one.target.name == target)


class RunResult(BaseModel):
    """What a finished flow returns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    exit_code: int
    rows: tuple[VariantResult, ...]
    targets: tuple[TargetOutcome, ...] = ()
    #: Fallbacks, where the rows missed a gate.
    ladder: tuple[Rung, ...] = ()
    task_metrics: tuple[Metric, ...]


def make_rows(run: Pipeline, measured: Measured, networks: Mapping[str, Network]) -> list[VariantResult]:
    """One row a variant; ratios and drops against the baseline are ``compare``'s."""
    with run.context.timed(f"intervals on {measured.target.name}"):
        baseline = resampled(run, next(iter(measured.evaluations.values())))
        return [
            make_row(run, measured, variant, networks[variant.name], baseline)
            for variant in run.recipe.variants
        ]


def make_row(
    run: Pipeline, measured: Measured, variant: Variant, network: Network, baseline: Resampled
) -> VariantResult:
    engine, evaluation = measured.engines[variant.name], measured.evaluations[variant.name]
    session = measured.benchmark
    spans = [found.intervals() for found in measured.of(variant.name)]
    validities = (one.validity for one in (measured.stream, measured.cascade) if one)
    return VariantResult(
        variant=variant.name,
        target=measured.target.name,
        precision=variant.precision,
        engine=measured.target.backend(variant).name,
        board=measured.info.machine,
        simulated=session.simulated or measured.info.is_simulated,
        metrics={
            "params": network.params,
            "macs": network.macs,
            "size_bytes": float(engine.size_bytes),
            "build_s": engine.metadata["build_s"],
            "integer_macs_ratio": engine.metadata.get("integer_macs_ratio"),
            "dla_layers_ratio": dla_layers_ratio(engine.metadata),
            **session.metrics(variant.name),
            **{name: value for found in measured.of(variant.name) for name, value in found.metrics().items()},
            **evaluation.metrics,
        },
        intervals={
            **session.variants[variant.name].intervals(),
            **{name: span for found in spans for name, span in found.items()},
            **drop_intervals(run, baseline, resampled(run, evaluation)),
        },
        validity=reduce(Validity.joined, validities, session.validity),
        notes=(*provider_notes(engine.metadata), *session.notes(variant.name)),
    )


def resampled(run: Pipeline, evaluation: Evaluation) -> Resampled:
    records = run.context.store.load_json(evaluation.records)
    return Resampled(records, run.context.workload.summarize, seed=stage_seed(run.context.seed, "drop"))


def drop_intervals(run: Pipeline, baseline: Resampled, other: Resampled) -> dict[str, tuple[float, float]]:
    """95 % interval of each task metric's drop, paired by sample."""
    return {
        drop_name(metric): paired_drop(
            baseline, other, metric.name, higher_is_better=metric.higher_is_better
        )[1]
        for metric in run.context.workload.metrics
    }


def conclude(
    run: Pipeline,
    rows: Sequence[VariantResult],
    measured: Sequence[Measured],
    networks: Mapping[str, Network],
    outcomes: Sequence[TargetOutcome],
) -> RunResult:
    """Logs the judged rows, one child run each, and the table as the run's description."""
    metrics = run.context.workload.metrics
    for one in measured:
        log_session(run, one)
        for row in rows:
            if row.target == one.target.name:
                log_row(run, one, row, networks[row.variant])
    table = "\n\n".join([stage_table_markdown(rows, metrics), *map(outcome_line, without_result(outcomes))])
    run.tracker.describe(run.run_id, description_of(run, table, measured))
    run.tracker.share_view(run.run_id, [name for one in metrics for name in (one.name, drop_name(one))])
    tags = {"gate": worst_gate(rows), "validity": validity_of(rows)}
    run.tracker.set_tags(run.run_id, tags | outcome_tags(outcomes))
    if any(row.simulated for row in rows):
        run.tracker.set_tags(run.run_id, {"simulated": "true"})
        run.tracker.rename(run.run_id, run.tracker.run(run.run_id).name + SIMULATED)
    result = RunResult(
        run_id=run.run_id,
        exit_code=run_exit_code(outcomes),
        rows=tuple(rows),
        targets=tuple(outcomes),
        task_metrics=tuple(metrics),
    )
    run.tracker.log_json(run.run_id, RESULT_PATH, result.model_dump(mode="json"))
    return result


def outcome_tags(outcomes: Sequence[TargetOutcome]) -> dict[str, str]:
    """Names of the targets without a result, by why they have none."""
    found: dict[str, list[str]] = {}
    for one in without_result(outcomes):
        found.setdefault(f"{one.status.lower()}_targets", []).append(one.name)
    return {tag: ", ".join(names) for tag, names in found.items()}


def run_exit_code(outcomes: Sequence[TargetOutcome]) -> int:
    """The gates' of all targets that were run on, as of one; where some failed, that of a FleetError, or its own of one
    that is alone."""
    tried = [one for one in outcomes if one.status is not TargetStatus.QUARANTINED]
    lost = failed(tried)
    if lost:
        return lost[0].exit_code if len(tried) == 1 else FleetError.exit_code
    return worst_exit_code(one.exit_code for one in tried)


def description_of(run: Pipeline, table: str, measured: Sequence[Measured]) -> str:
    """What a reviewer reads first: the recipe's sentence, what was chosen, the stage table, and what frames cost."""
    report = (
        f"{REPORT_LINK}({run.tracker.page_of(run.run_id, REPORT_PATH)}) has charts and tells what they mean; "
        f"[all variants]({run.tracker.page_of_view(run.run_id)}) of this recipe's runs stand in one table."
    )
    parts = [run.recipe.description, report, *run.notes, table]
    for one in measured:
        where = f"{one.target.name}: {one.info.machine}"
        parts += [stream_markdown(one.stream, where=where)] if one.stream else []
        parts += [cascade_markdown(one.cascade, where=where)] if one.cascade else []
    return "\n\n".join(part for part in parts if part)


def with_comparison(description: str, line: str) -> str:
    """The description with one more comparison, right behind the report: what is too long is cut at its end."""
    parts = description.split("\n\n") if description else []
    others = [part for part in parts if not part.startswith(COMPARED)]
    earlier = [one for part in parts if part.startswith(COMPARED) for one in part.splitlines()[1:]]
    shown = [f"- {line}", *earlier][:COMPARISONS_SHOWN]
    behind = next((place for place, part in enumerate(others, 1) if part.startswith(REPORT_LINK)), 0)
    return "\n\n".join([*others[:behind], "\n".join([COMPARED, *shown]), *others[behind:]])


def log_session(run: Pipeline, measured: Measured) -> None:
    """What belongs to a target as a whole: what it is, the session that timed its engines, every sample."""
    folder = f"targets/{measured.target.name}"
    run.tracker.log_json(run.run_id, f"{folder}/target.json", measured.info.model_dump(mode="json"))
    run.tracker.log_json(run.run_id, f"{folder}/benchmark.json", measured.benchmark.model_dump(mode="json"))
    run.log_files(run.run_id, {f"{folder}/samples.safetensors": measured.benchmark.samples})
    log_stream(run, measured, folder)
    log_cascade(run, measured, folder)
    log_telemetry(run, measured, folder)
    log_layers(run, measured, folder)


def log_stream(run: Pipeline, measured: Measured, folder: str) -> None:
    """What frames cost by step, and the time of every single one."""
    if measured.stream is None:
        return
    run.tracker.log_text(run.run_id, f"{folder}/stream.csv", stream_csv(measured.stream))
    run.tracker.log_json(run.run_id, f"{folder}/stream.json", measured.stream.model_dump(mode="json"))
    run.log_files(run.run_id, {f"{folder}/stream.safetensors": measured.stream.samples})


def log_cascade(run: Pipeline, measured: Measured, folder: str) -> None:
    """What both engines gave together, a record for each sample, and the time of every step."""
    if measured.cascade is None:
        return
    run.tracker.log_json(run.run_id, f"{folder}/cascade.json", measured.cascade.model_dump(mode="json"))
    records = {
        f"{folder}/cascade/{name}.records.json": found.records
        for name, found in measured.cascade.variants.items()
    }
    run.log_files(run.run_id, {f"{folder}/cascade.safetensors": measured.cascade.samples, **records})


def log_telemetry(run: Pipeline, measured: Measured, folder: str) -> None:
    """The sensors' samples: all of them as files, and as many as a chart shows as time series."""
    for path, told in (("telemetry", measured.benchmark.telemetry), ("power", measured.benchmark.power)):
        if told is None:
            continue
        run.log_files(run.run_id, {f"{folder}/{path}.safetensors": told.samples})
        times_s, columns = read_series(run.context.store.open(told.samples))
        # the power pass has everything again, on a machine that it heats
        named = {
            f"{measured.target.name}.{name}": values
            for name, values in columns.items()
            if path == "telemetry" or name.startswith("power_w.")
        }
        run.tracker.log_time_series(run.run_id, times_s, named)


def log_layers(run: Pipeline, measured: Measured, folder: str) -> None:
    """A table of layers for each engine that has them, and what int8 lost against fp16."""
    for variant, layers in measured.benchmark.layers.items():
        run.tracker.log_text(run.run_id, f"{folder}/layers/{variant}.csv", layers_csv(layers))
    where = f"{measured.target.name}: {measured.info.machine}"
    for report in int8_reports(run.recipe.variants, measured.benchmark.layers):
        path = f"{folder}/int8_report/{report.int8}"
        run.tracker.log_text(run.run_id, f"{path}.md", report_markdown(report, where=where))
        run.tracker.log_json(run.run_id, f"{path}.json", report.to_json())


def log_row(run: Pipeline, measured: Measured, row: VariantResult, network: Network) -> None:
    """A child run: one variant on one target, with everything that is deployed."""
    engine = measured.engines[row.variant]
    tags = {
        "variant": row.variant,
        "precision": row.precision,
        "target": row.target,
        "target_class": measured.target.target_class,
        "engine": row.engine,
        "board": row.board,
        **({"simulated": "true"} if row.simulated else {}),
        "validity": validity_of([row]),
        "gate": worst_gate([row]),
    }
    name = f"{row.variant} on {row.target}{SIMULATED if row.simulated else ''}"
    child = run.tracker.start_child(run.run_id, name, flat_params(run.recipe), tags)
    run.tracker.log_metrics(child, row.metrics)
    run.tracker.log_json(child, "passport.json", engine.metadata)
    run.tracker.log_json(child, "row.json", row.model_dump(mode="json"))
    run.log_files(
        child,
        {
            "checkpoint.safetensors": network.checkpoint,
            "model.onnx": measured.models[row.variant],
            f"engine{engine.suffix}": engine,
            "records.json": measured.evaluations[row.variant].records,
        },
    )
    run.tracker.finish(child, "FINISHED")


def worst_gate(rows: Sequence[VariantResult]) -> str:
    """FAIL, UNKNOWN or PASS, whichever is the worst; empty without gates."""
    verdicts = {gate.verdict for row in rows for gate in row.gates}
    return next((str(v) for v in (Verdict.FAIL, Verdict.UNKNOWN, Verdict.PASS) if v in verdicts), "")


def validity_of(rows: Sequence[VariantResult]) -> str:
    return "VALID" if all(row.validity.valid for row in rows) else "INVALID"
