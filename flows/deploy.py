"""The deploy flow: from a trained network to engines measured on every target.

load ─┬─ analyze
      └─ sensitivity ── prune ── finetune ── sensitivity ── ptq ── qat      on the host, reused by content
                      └────────┴──────┴─ export ── verify      for each variant
                                           └─ build ── benchmark ── stream ── evaluate    on each target
                                                                                   └─ compare ── gate ── package

A recipe with a cascade has the stages down to build once more for its classifier; both engines then run as one,
behind evaluate.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from prefect import flow
from prefect.futures import PrefectFuture

from jetway.configs.schema import (
    Backend,
    CalibrationMethod,
    Precision,
    QatConfig,
    Stage,
    Target,
    Variant,
)
from jetway.flows.cascade import open_classifier, run_cascade
from jetway.flows.check import check_fallbacks
from jetway.flows.fleet import open_fleet
from jetway.flows.pipeline import Pipeline, open_pipeline
from jetway.flows.plan_b import climb
from jetway.flows.record import Attempt, Measured, Network, RunResult, conclude, make_rows
from jetway.flows.report import log_report
from jetway.flows.server import QUEUE_TIMEOUT_S, queue_for
from jetway.flows.zombies import without_process_tag
from jetway.tasks.analyze import analyze
from jetway.tasks.artifacts import Checkpoint, Engine, OnnxModel, Package, Report
from jetway.tasks.benchmark import benchmark
from jetway.tasks.build import build
from jetway.tasks.calibrate import calibrate, calibration_sets
from jetway.tasks.compare import compare
from jetway.tasks.errors import FleetError
from jetway.tasks.evaluate import evaluate
from jetway.tasks.export import export
from jetway.tasks.finetune import finetune
from jetway.tasks.gates import winner
from jetway.tasks.load import load
from jetway.tasks.lower import lower
from jetway.tasks.measurement import BenchmarkResult, Evaluation
from jetway.tasks.package import package
from jetway.tasks.prune import prune
from jetway.tasks.qat import ptq, qat
from jetway.tasks.results import VariantResult, load_rows
from jetway.tasks.sensitivity import int8_sensitivity, pruning_sensitivity, with_chosen_layers
from jetway.tasks.stream import stream
from jetway.tasks.stream_result import StreamResult
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.verify import verify

logger = logging.getLogger("jetway")

Models = dict[tuple[Backend, Variant], OnnxModel]


@flow(name="deploy", flow_run_name="{recipe}", persist_result=False)
def deploy(
    recipe: str = "digits",
    targets: list[str] | None = None,
    overrides: list[str] | None = None,
    busy_timeout_s: float | None = None,
) -> RunResult:
    """Deploys a recipe to its targets, and returns a row for each variant on each of them.

    Args:
        recipe: Name of a recipe, or the path of its YAML file in the project.
        targets: Names of targets, or their YAML files, instead of those that the recipe names.
        overrides: Keys of the recipe to change, each as key=value, such as qat.epochs=3.
        busy_timeout_s: Longest wait for a busy target, in seconds, instead of each target's own; 0 fails at once.
    """
    with without_process_tag(), open_pipeline(recipe, targets, overrides or [], busy_timeout_s) as run:
        check_fallbacks(run.recipe, run.path)
        first = attempt(run)
        result = climb(run, first, attempt)
        if isinstance(first.error, FleetError):
            first.error.result = result
        if first.error:
            raise first.error
        return result


def attempt(run: Pipeline) -> Attempt:
    """The recipe once on its targets. Raises when none gives a result."""
    with open_classifier(run) as classifier, open_fleet(run) as fleet:
        fleet.wait_for_first()
        for part in filter(None, (run, classifier)):
            check_calibration(part)
        networks = make_networks(run)
        models = make_models(run, networks, fleet.targets)
        behind = make_models(classifier, make_networks(classifier), fleet.targets) if classifier else {}
        measured = fleet.measure(partial(measure, run, networks, models, classifier, behind))
        rows = judge(run, measured)
        fleet.each(partial(package_for, run, measured, rows))
        result = conclude(run, rows, measured, networks, fleet.outcomes(rows))
    with run.context.timed("report"):
        log_report(run.tracker, run.run_id)
    return Attempt(result, measured, fleet.error(result))


def make_networks(run: Pipeline) -> dict[str, Network]:
    """A trained network for each variant of the recipe, in the recipe's order."""
    context, recipe = run.context, run.recipe
    baseline = run.keep("load", load(context, run.checkpoint, recipe.train), Checkpoint)
    analysis = analyze(context, baseline, recipe.analyze)
    run.keep("analyze", analysis, Report)
    networks = {Stage.BASELINE: quantize(run, Stage.BASELINE, Network.of(baseline, analysis), baseline)}
    if run.variants(Stage.PRUNED):
        pruning = prune(context, baseline, recipe.prune, recipe.finetune, pruning_curves(run, baseline))
        pruned = run.keep("prune", pruning, Checkpoint)
        tuned = run.keep("finetune", finetune(context, pruned, recipe.finetune, baseline), Checkpoint)
        networks[Stage.PRUNED] = quantize(run, Stage.PRUNED, Network.of(tuned, pruning), baseline)
    return {variant.name: networks[variant.stage][variant.name] for variant in recipe.variants}


def check_calibration(run: Pipeline) -> None:
    """The calibration sets as artifacts, and refused before anything is trained."""
    for section in calibration_sets(run.recipe):
        run.keep(f"calibration/{section.calibration_set}", calibrate(run.context, section), Report)


def quantize(run: Pipeline, stage: Stage, network: Network, teacher: Checkpoint) -> dict[str, Network]:
    """The network of each variant: the float one itself, PTQ by each calibration, and QAT, which goes on from PTQ."""
    variants = run.variants(stage)
    networks = {variant.name: network for variant in variants}
    quantized = [variant for variant in variants if variant.precision.has_quantizers]
    if not quantized:
        return networks
    config = float_layers(run, stage, network.checkpoint)
    methods = dict.fromkeys(variant.calibration or config.calibration for variant in quantized)
    calibrated = {method: ptq_by(run, stage, network, config, method) for method in methods}
    for variant in quantized:
        networks[variant.name] = network.quantized(calibrated[variant.calibration or config.calibration])
    if any(variant.precision is Precision.INT8_QAT for variant in quantized):
        training = qat(run.context, calibrated[config.calibration], config, teacher)
        trained = network.quantized(run.keep(f"{stage}/qat", training, Checkpoint))
        networks |= {v.name: trained for v in quantized if v.precision is Precision.INT8_QAT}
    return networks


def ptq_by(
    run: Pipeline, stage: Stage, network: Network, config: QatConfig, method: CalibrationMethod
) -> Checkpoint:
    """PTQ by one method; those besides the recipe's own are kept under their names."""
    name = "ptq" if method is config.calibration else f"ptq-{method}"
    chosen = config.model_copy(update={"calibration": method})
    return run.keep(f"{stage}/{name}", ptq(run.context, network.checkpoint, chosen), Checkpoint)


def pruning_curves(run: Pipeline, baseline: Checkpoint) -> Report | None:
    """What pruning does to each part of the baseline, where the recipe wants it measured."""
    section, config = run.recipe.pruning_sensitivity, run.recipe.prune
    if section is None:
        return None
    measured = pruning_sensitivity(run.context, baseline, config, section)
    report = run.keep("prune/pruning_sensitivity", measured, Report)
    return report if config.pruning_ratio == "auto" else None


def float_layers(run: Pipeline, stage: Stage, checkpoint: Checkpoint) -> QatConfig:
    """The qat section with the layers that stay in float, measured where the recipe wants it."""
    section, config = run.recipe.int8_sensitivity, run.recipe.qat
    if section is None:
        return config
    measured = int8_sensitivity(run.context.labelled(stage), checkpoint, config, section)
    report = run.context.store.load_json(run.keep(f"{stage}/int8_sensitivity", measured, Report))
    return with_chosen_layers(config, report)


def make_models(run: Pipeline, networks: Mapping[str, Network], targets: Sequence[Target]) -> Models:
    """The ONNX file of each variant for each engine that the targets run it with, made once."""
    wanted = {(target.backend(v), v): None for target in targets for v in run.recipe.variants}
    engines: dict[Variant, int] = Counter(variant for _, variant in wanted)
    return {
        (backend, variant): make_model(
            run,
            variant,
            networks[variant.name],
            backend,
            folder=variant.name if engines[variant] == 1 else f"{variant.name}/{backend.name}",
        )
        for backend, variant in wanted
    }


def make_model(
    run: Pipeline, variant: Variant, network: Network, backend: Backend, *, folder: str
) -> OnnxModel:
    """The ONNX file of a variant as an engine wants it, verified against PyTorch."""
    context, recipe, precision = run.context.labelled(variant.name), run.recipe, variant.precision
    exported = export(context, network.checkpoint, recipe.export, precision.exported)
    model = run.keep(f"{variant.name}/export", exported, OnnxModel)
    form = lower(context, model, backend, precision, recipe.qat, recipe.tensorrt)
    lowered = run.keep(f"{folder}/lower", form, OnnxModel)
    parity = verify(context, network.checkpoint, lowered, recipe.verify, precision)
    run.keep(f"{folder}/verify", parity, Report)
    return lowered


def measure(
    run: Pipeline,
    networks: Mapping[str, Network],
    models: Models,
    classifier: Pipeline | None,
    behind: Models,
    target: Target,
    info: TargetInfo,
) -> Measured:
    """All that one target gives, in its turn among the flows of this Prefect server; its own lease decides."""
    with queue_for(target.name, timeout_s=min(QUEUE_TIMEOUT_S, target.busy_timeout_s)):
        measured = collect(submit_session(run, target, models), info)
        if classifier:
            measured = run_cascade(run, classifier, behind, measured)
    return replace(measured, rows=tuple(make_rows(run, measured, networks)))


@dataclass(frozen=True)
class Session:
    """What was submitted for one target; its results come in this order."""

    target: Target
    models: dict[str, OnnxModel]
    engines: dict[str, PrefectFuture[Engine]]
    benchmark: PrefectFuture[BenchmarkResult]
    stream: PrefectFuture[StreamResult] | None
    evaluations: dict[str, PrefectFuture[Evaluation]]


def submit_session(run: Pipeline, target: Target, models: Models) -> Session:
    """Builds side by side, then one benchmark session of all engines, then their evaluations."""
    context, recipe = run.context, run.recipe
    backends = {variant.name: target.backend(variant) for variant in recipe.variants}
    own = {variant.name: models[target.backend(variant), variant] for variant in recipe.variants}
    engines = {
        name: build.submit(
            context, target, model, recipe.build, recipe.tensorrt, backend=backends[name], variant=name
        )
        for name, model in own.items()
    }
    timed = benchmark.submit(context, target, engines, recipe.benchmark, return_state=False)
    streamed = submit_stream(run, target, engines, timed) if recipe.benchmark.stream else None
    evaluations = {
        variant: evaluate.submit(
            context,
            target,
            engine,
            recipe.evaluate,
            variant=variant,
            return_state=False,
            wait_for=[streamed or timed],
        )
        for variant, engine in engines.items()
    }
    return Session(target, own, engines, timed, streamed, evaluations)


def submit_stream(
    run: Pipeline,
    target: Target,
    engines: dict[str, PrefectFuture[Engine]],
    timed: PrefectFuture[BenchmarkResult],
) -> PrefectFuture[StreamResult]:
    """Frames through all engines, once the benchmark has left the target alone."""
    return stream.submit(
        run.context,
        target,
        engines,
        run.recipe.benchmark,
        run.stream_source,
        return_state=False,
        wait_for=[timed],
    )


def collect(session: Session, info: TargetInfo) -> Measured:
    """Waits for a session in the order of the graph, so that the first error is the true one."""
    return Measured(
        target=session.target,
        info=info,
        models=session.models,
        engines={variant: future.result() for variant, future in session.engines.items()},
        benchmark=session.benchmark.result(),
        stream=session.stream.result() if session.stream else None,
        evaluations={variant: future.result() for variant, future in session.evaluations.items()},
    )


def judge(run: Pipeline, measured: Sequence[Measured]) -> list[VariantResult]:
    """The rows of all targets with their ratios, each to the baseline of its own target, and their gates."""
    rows = [row for one in measured for row in one.rows]
    table = run.keep("compare", compare(run.context, rows, run.recipe.gates), Report)
    return load_rows(run.context.store.load_json(table))[0]


def package_for(
    run: Pipeline,
    measured: Sequence[Measured],
    rows: Sequence[VariantResult],
    target: Target,
    info: TargetInfo,
) -> None:
    """Packages the winner of a target among the run's files, unless no variant may be deployed."""
    best = winner([row for row in rows if row.target == target.name])
    if best is None:
        logger.warning("%s: nothing is packaged, because every variant failed a gate", target.name)
        return
    found = next(one for one in measured if one.target.name == target.name)
    engine, model = found.engines[best.variant], found.models[best.variant]
    behind = found.behind.get(best.variant)
    packaged = package(run.context, target, engine, model, variant=best.variant, behind=behind)
    run.keep(f"targets/{target.name}/package", packaged, Package)
    run.tracker.set_tags(run.run_id, {f"package.{target.name}": best.variant})
