"""Sensitivity: what each part of a network can bear, measured one part at a time.

Two stages: of pruning, before channels are chosen, and of INT8, before layers are quantized. Both score the
workload's calibration data by its primary metric and its loss, without any fine-tuning, and the results are
reused by content. ``prune.pruning_ratio: auto`` and ``qat.keep_float: auto`` decide by them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import nn

from jetway.configs.schema import PruneConfig, QatConfig, Section, SensitivityConfig
from jetway.tasks.artifacts import Checkpoint, Figure, StageOutput
from jetway.tasks.channels import Candidate, Limits, apply_cuts, checked_outputs, plan_cuts
from jetway.tasks.chart import add_chart, new_canvas
from jetway.tasks.checkpoint import load_network
from jetway.tasks.errors import PruningError, QuantizationError
from jetway.tasks.importance import rank_candidates
from jetway.tasks.macs import total_macs
from jetway.tasks.patterns import matching_names, prunable_names
from jetway.tasks.quantization import (
    CalibrationSection,
    calibration_section,
    input_quantizers,
    quantize_network,
)
from jetway.tasks.score import Score, Scorer
from jetway.tasks.stage import StageContext, run_stage

SCHEMA_VERSION = 1

# Most lines or bars of a chart; the table has them all.
_CHARTED = 24


class PruningSensitivity(Section):
    """What the stage's result depends on."""

    sensitivity: SensitivityConfig
    importance: str
    calibration_batches: int
    ignored_layers: tuple[str, ...]
    round_to: int
    max_pruning_ratio: float
    prune_revision: int


class Int8Sensitivity(Section):
    sensitivity: SensitivityConfig
    calibration: CalibrationSection
    max_metric_drop: float | None


def measure_pruning(
    context: StageContext, baseline: Checkpoint, config: PruneConfig, section: SensitivityConfig
) -> StageOutput:
    """For every group of channels and ratio: metric and loss when it alone is pruned, and the MACs that remain.

    Raises PruningError when the network cannot be traced, WorkloadError when calibration data have no targets.
    """
    network = load_network(context.workload, baseline, context.store)
    names = prunable_names(network)
    ignored = matching_names(config.ignored_layers, names, "prune.ignored_layers")
    ranked = rank_candidates(
        context, network, config, frozenset(name for found in ignored.values() for name in found)
    )
    scorer = Scorer(context, section.samples)
    whole, macs = scorer(network), total_macs(network, context.workload.example_inputs())
    rows, unable = [], {}
    for number, candidate in enumerate(ranked):
        context.progress("sensitivity", number, len(ranked), candidate.members[0])
        try:
            for ratio in section.pruning_ratios:
                kept, trial = _pruned_alone(context, network, candidate, ratio, config)
                left = total_macs(trial, context.workload.example_inputs()) / macs
                rows.append(_row(scorer, whole, scorer(trial), candidate, ratio, kept, left))
        except PruningError as exc:
            unable[candidate.members[0]] = str(exc)
    report = _document(context, scorer, whole, rows) | {"cannot_be_pruned": unable}
    chart = _draw_curves(context, rows, report["metric"], parent=baseline)
    return _output(context, baseline, "pruning_sensitivity", report, chart)


def measure_int8(
    context: StageContext, checkpoint: Checkpoint, config: QatConfig, section: SensitivityConfig
) -> StageOutput:
    """For every layer: metric and loss when it alone is INT8, and when all but it are.

    With ``keep_float: auto`` also the fewest layers, the most sensitive first, without which INT8 loses at most
    ``max_metric_drop``. Raises QuantizationError when no layer could be INT8 within it.
    """
    network = load_network(context.workload, checkpoint, context.store)
    scorer = Scorer(context, section.samples)
    whole = scorer(network)
    calibration = calibration_section(config.model_copy(update={"keep_float": ()}))
    quantize_network(network, context.workload, calibration, device=context.device)
    layers = list(input_quantizers(network))
    rows = []
    for number, layer in enumerate(layers):
        context.progress("sensitivity", number, len(layers), layer)
        alone, without = (_scored(scorer, network, only) for only in ([layer], _without(layers, [layer])))
        rows.append(
            {
                "module": layer,
                "metric_alone": alone.metric,
                "drop_alone": scorer.drop(whole, alone),
                "loss_rise_alone": _finite(alone.loss - whole.loss),
                "metric_without": without.metric,
                "loss_without": _finite(without.loss),
            }
        )
    everything = _scored(scorer, network, layers)
    report = _document(context, scorer, whole, rows) | {"all_int8": _told(everything)}
    if config.keep_float == "auto":
        report |= _fewest_float(scorer, network, whole, rows, config.max_metric_drop)
    chart = _draw_layers(context, rows, report, parent=checkpoint)
    output = _output(context, checkpoint, "int8_sensitivity", report, chart)
    return output.model_copy(update={"notes": _notes(report)})


def with_chosen_layers(config: QatConfig, report: Mapping[str, Any]) -> QatConfig:
    """The section with the layers that ``keep_float: auto`` found in the place of ``auto``."""
    if config.keep_float != "auto":
        return config
    return config.model_copy(update={"keep_float": tuple(report["keep_float"])})


@task(name="pruning sensitivity", cache_policy=NO_CACHE, persist_result=False)
def pruning_sensitivity(
    context: StageContext, baseline: Checkpoint, config: PruneConfig, section: SensitivityConfig
) -> StageOutput:
    return run_stage(
        context,
        "pruning sensitivity",
        lambda ctx: measure_pruning(ctx, baseline, config, section),
        inputs=[baseline],
        section=PruningSensitivity(
            sensitivity=section,
            prune_revision=config.revision,
            **{
                key: getattr(config, key)
                for key in PruningSensitivity.model_fields
                if key in PruneConfig.model_fields
            },
        ),
    )


@task(name="int8 sensitivity", cache_policy=NO_CACHE, persist_result=False)
def int8_sensitivity(
    context: StageContext, checkpoint: Checkpoint, config: QatConfig, section: SensitivityConfig
) -> StageOutput:
    automatic = config.keep_float == "auto"
    return run_stage(
        context,
        "int8 sensitivity",
        lambda ctx: measure_int8(ctx, checkpoint, config, section),
        inputs=[checkpoint],
        section=Int8Sensitivity(
            sensitivity=section,
            calibration=calibration_section(config.model_copy(update={"keep_float": ()})),
            max_metric_drop=config.max_metric_drop if automatic else None,
        ),
    )


def _pruned_alone(
    context: StageContext, network: nn.Module, candidate: Candidate, ratio: float, config: PruneConfig
) -> tuple[int, nn.Module]:
    """Channels that are left, and a copy that is cut."""
    trial, workload = copy.deepcopy(network), context.workload
    limits = Limits(config.round_to, config.max_pruning_ratio, {candidate.root: candidate.channels})
    cuts = plan_cuts([candidate], ratio, {}, limits, ranked_globally=False)
    apply_cuts(trial, workload.example_inputs(), workload.output_names, cuts)
    checked_outputs(trial, workload.example_inputs(), workload.output_names)
    return candidate.channels - sum(len(cut.indices) for cut in cuts), trial


def _row(
    scorer: Scorer,
    whole: Score,
    score: Score,
    candidate: Candidate,
    ratio: float,
    kept: int,
    macs_ratio: float,
) -> dict[str, Any]:
    return {
        "module": candidate.members[0],
        "members": list(candidate.members),
        "channels": candidate.channels,
        "ratio": ratio,
        "kept": kept,
        "metric": score.metric,
        "drop": scorer.drop(whole, score),
        "loss_rise": _finite(score.loss - whole.loss),
        "macs_ratio": macs_ratio,
    }


def _scored(scorer: Scorer, network: nn.Module, layers: Sequence[str]) -> Score:
    with _only(network, layers):
        return scorer(network)


@contextmanager
def _only(network: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Within, just these of the network's quantized layers are INT8."""
    off = [network.get_submodule(name) for name in _without(list(input_quantizers(network)), layers)]
    quantizers: list[Any] = [
        getattr(layer, kind) for layer in off for kind in ("input_quantizer", "weight_quantizer")
    ]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


def _fewest_float(
    scorer: Scorer, network: nn.Module, whole: Score, rows: Sequence[dict[str, Any]], limit: float
) -> dict[str, Any]:
    """Layers to keep in float: as many of the most sensitive as it takes, less those that turn out not to matter."""
    ranked = [row["module"] for row in sorted(rows, key=_sensitivity, reverse=True)]
    tried: list[dict[str, Any]] = []

    def holds(kept: Sequence[str]) -> bool:
        drop = scorer.drop(whole, _scored(scorer, network, _without(ranked, kept)))
        tried.append({"keep_float": list(kept), "drop": drop})
        return drop <= limit

    kept = ranked[: _smallest(lambda count: holds(ranked[:count]), len(ranked))]
    if len(kept) == len(ranked):
        raise QuantizationError(
            f"qat.keep_float: auto finds no layer that may be int8 within qat.max_metric_drop {limit:g}. Raise the "
            "limit, or calibrate otherwise (qat.calibration, qat.calibration_samples)."
        )
    for layer in reversed(kept[:-1]):
        if holds(_without(kept, [layer])):
            kept = _without(kept, [layer])
    drop = next(trial["drop"] for trial in reversed(tried) if trial["keep_float"] == kept)
    return {"keep_float": kept, "drop": drop, "max_metric_drop": limit, "tried": tried}


def _notes(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What was kept in float and why; nothing without ``keep_float: auto``."""
    if "keep_float" not in report:
        return ()
    kept = ", ".join(report["keep_float"]) or "no layer"
    return (
        f"qat.keep_float auto keeps {kept} in float. The drop of {report['metric']} on {report['measured_on']}, goes "
        f"from {report['tried'][0]['drop']:.4f} to {report['drop']:.4f}; the limit is {report['max_metric_drop']:g}.",
    )


def _smallest(holds: Callable[[int], bool], most: int) -> int:
    """Smallest count that holds, if more never hold less; ``most`` is taken to hold."""
    low, high = -1, 0
    while high < most and not holds(high):
        low, high = high, min(most, max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _sensitivity(row: dict[str, Any]) -> tuple[float, float]:
    loss = row["loss_rise_alone"]
    return math.inf if loss is None else loss, row["drop_alone"]


def _without(layers: Sequence[str], some: Sequence[str]) -> list[str]:
    return [layer for layer in layers if layer not in some]


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _told(score: Score) -> dict[str, float | None]:
    return {"metric": score.metric, "loss": _finite(score.loss)}


def _document(
    context: StageContext, scorer: Scorer, whole: Score, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "metric": context.workload.primary_metric.name,
        "measured_on": f"{len(scorer.samples)} samples of the calibration data, on the host",
        "whole": _told(whole),
        "rows": rows,
    }


def _output(
    context: StageContext, checkpoint: Checkpoint, name: str, document: dict[str, Any], chart: Figure
) -> StageOutput:
    report = context.store.add_json(document, parents=(checkpoint.sha256,))
    return StageOutput(handle=report, files={f"{name}.json": report, f"{name}.png": chart})


def _draw_curves(
    context: StageContext, rows: Sequence[dict[str, Any]], metric: str, *, parent: Checkpoint
) -> Figure:
    """The metric's drop over the ratio, a line for each of the most sensitive groups."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["module"], []).append(row)
    shown = sorted(lines.items(), key=lambda line: max(row["drop"] for row in line[1]), reverse=True)[
        :_CHARTED
    ]
    canvas = new_canvas(9, 5.5)
    axes = canvas.subplots()
    for module, line in shown:
        axes.plot(
            [0, *(row["ratio"] for row in line)],
            [0, *(row["drop"] for row in line)],
            marker="o",
            label=module,
        )
    axes.set_xlabel("share of its channels that goes, nothing else pruned")
    axes.set_ylabel(f"drop of {metric} on calibration data, before fine-tuning")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return add_chart(context.store, canvas, parents=(parent.sha256,))


def _draw_layers(
    context: StageContext, rows: Sequence[dict[str, Any]], report: dict[str, Any], *, parent: Checkpoint
) -> Figure:
    """How far the loss rises with each layer alone in INT8; those kept in float stand out."""
    shown = sorted(rows, key=_sensitivity)[-_CHARTED:]
    kept = report.get("keep_float", ())
    canvas = new_canvas(9, 1.8 + 0.28 * len(shown))
    axes = canvas.subplots()
    colors = ["#d1495b" if row["module"] in kept else "#33658a" for row in shown]
    axes.barh(
        [row["module"] for row in shown], [row["loss_rise_alone"] or 0.0 for row in shown], color=colors
    )
    axes.set_xlabel("rise of the loss on calibration data with this layer alone in int8")
    axes.tick_params(axis="y", labelsize=8)
    return add_chart(context.store, canvas, parents=(parent.sha256,))
