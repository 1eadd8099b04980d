"""``jetway check``, ``probe`` and ``trust``: what a target is, before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from jetway.configs.load import fallback_recipes
from jetway.configs.schema import (
    BenchmarkConfig,
    CalibrationMethod,
    DistillationConfig,
    EngineName,
    Precision,
    Recipe,
    Stage,
    Target,
)
from jetway.flows.pipeline import Observer, classifier_recipe, make_context
from jetway.tasks.calibrate import calibration_sets
from jetway.tasks.calibration import calibration_set
from jetway.tasks.contract import Contract, JetPack, contract_of
from jetway.tasks.depth import matching_containers
from jetway.tasks.errors import ConfigError, JetwayError
from jetway.tasks.export import onnx_node_names
from jetway.tasks.features import feature_names
from jetway.tasks.load import NO_BASELINE, checkpoint_input
from jetway.tasks.lowering.for_tensorrt import check_patterns
from jetway.tasks.patterns import matching_attention, matching_names, prunable_names
from jetway.tasks.preflight import check_target, probe_target, warn_of_fallbacks
from jetway.tasks.quantization import matching_modules
from jetway.tasks.requirements import profile_problems
from jetway.tasks.smoothing import NOTHING_TO_SMOOTH, has_smoothable_layers
from jetway.tasks.target.session import open_target
from jetway.tasks.target.trust import fetch_host_key, record_host_key
from jetway.tasks.target_info import EngineInfo, TargetInfo
from jetway.tasks.workload import Workload, check_training_data, check_workload


def check_recipe(recipe: Recipe, path: Path, targets: Sequence[Target]) -> None:
    """Raises what a run would raise before it trains anything."""
    check_without_targets(recipe, path)
    for own, beside in trained_recipes(recipe, path):
        check_training_data(make_context(own, beside, Observer()).workload)
    for target in targets:
        info = probe(target, recipe.benchmark)
        check_target(recipe, target, info)
        warn_of_fallbacks(recipe, target, info)


def trained_recipes(recipe: Recipe, path: Path) -> list[tuple[Recipe, Path]]:
    """The recipe, and that of a cascade's classifier, each with its file."""
    return [(recipe, path), *([classifier_recipe(recipe, path)] if recipe.cascade else [])]


def check_without_targets(recipe: Recipe, path: Path) -> None:
    """Raises what a run would raise before it has looked at a target."""
    check_one(recipe, path)
    check_classifier(recipe, path)
    check_fallbacks(recipe, path)


def check_one(recipe: Recipe, path: Path) -> None:
    """The recipe's own workload, and whether the recipe fits it."""
    workload = make_context(recipe, path, Observer()).workload
    check_workload(workload)
    check_recipe_fits(recipe, path, workload)


def check_classifier(recipe: Recipe, path: Path) -> None:
    """The same for the recipe of a cascade's classifier, which is trained after the detector. Raises ConfigError."""
    if recipe.cascade is None:
        return
    classifier, beside = classifier_recipe(recipe, path)
    try:
        check_one(classifier, beside)
    except JetwayError as exc:
        raise ConfigError(f"{path}, cascade.classifier {recipe.cascade.classifier}: {exc}") from exc


def check_fallbacks(recipe: Recipe, path: Path) -> None:
    """The same for every fallback of the recipe. Raises ConfigError with the name of the one that cannot be."""
    for name, other in fallback_recipes(recipe, source=str(path)).items():
        try:
            check_without_targets(other, path)
        except JetwayError as exc:
            raise ConfigError(f"{path}, plan_b {name}: {exc}") from exc


def check_recipe_fits(recipe: Recipe, path: Path, workload: Workload) -> None:
    """Whether there is a baseline to start from, and the recipe's patterns match modules of the network.

    ``path`` is the recipe's file, ``workload`` one that ``check_workload`` has passed. Raises ConfigError.
    """
    checkpoint = recipe.workload.checkpoint
    if checkpoint is not None:
        checkpoint_input(path.parent / checkpoint)
    elif recipe.train is None:
        raise ConfigError(NO_BASELINE)
    network = workload.network()
    if any(variant.stage is Stage.PRUNED for variant in recipe.variants):
        names = prunable_names(network)
        matching_names(recipe.prune.ignored_layers, names, "prune.ignored_layers")
        matching_names(recipe.prune.pruning_ratios, names, "prune.pruning_ratios")
        matching_attention(recipe.prune.head_ratios, network, "prune.head_ratios")
        if recipe.prune.depth:
            matching_containers(network, workload.example_inputs(), workload.output_names, recipe.prune.depth)
        check_features(recipe.finetune.distillation, network)
    if any(variant.precision.has_quantizers for variant in recipe.variants):
        matching_modules(network, recipe.qat.float_patterns, key="qat.keep_float")
        check_features(recipe.qat.distillation, network)
        check_smoothing(recipe, network, workload)
    for section in calibration_sets(recipe):
        calibration_set(workload, section.calibration_set)
    if recipe.tensorrt.mixed:
        check_patterns(recipe.tensorrt.mixed, onnx_node_names(workload, recipe.export))
    shapes = {name: tuple(tensor.shape) for name, tensor in workload.example_inputs().items()}
    problems = list(profile_problems(recipe, shapes))
    if problems:
        raise ConfigError("\n".join(problems))


def check_features(distillation: DistillationConfig | None, network: nn.Module) -> None:
    if distillation:
        feature_names(distillation.features, network, network)


def check_smoothing(recipe: Recipe, network: nn.Module, workload: Workload) -> None:
    """Raises ConfigError when a variant with quantizers is to be smoothed, and the network has nothing for it."""
    quantized = [variant for variant in recipe.variants if variant.precision.has_quantizers]
    asked = [
        v.name
        for v in quantized
        if (v.calibration or recipe.qat.calibration) is CalibrationMethod.SMOOTHQUANT
    ]
    if asked and not has_smoothable_layers(network, workload.example_inputs(), workload.output_names):
        raise ConfigError(f"{', '.join(asked)}: {NOTHING_TO_SMOOTH}")


def probe(target: Target, benchmark: BenchmarkConfig | None = None) -> TargetInfo:
    with open_target(target) as session:
        return probe_target(session, benchmark)


def print_target(target: Target, *, as_json: bool) -> None:
    info = probe(target)
    if as_json:
        print(info.model_dump_json(indent=1))
        return
    table = Table(box=None, show_header=False, title=target.name, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in facts(info):
        table.add_row(*row)
    Console().print(table)


def facts(info: TargetInfo) -> Iterator[tuple[str, str]]:
    """What a person wants to know of a target, a name and a value each."""
    yield "machine", info.machine
    yield "system", f"{info.hostname}, {info.os}, Linux {info.kernel}"
    if info.module:
        yield "module", info.module
    if info.l4t:
        yield "Jetson Linux", info.l4t.removeprefix("# ")
    yield "Python", info.python
    yield "memory", f"{info.memory_mib.available or 0:.0f} of {info.memory_mib.total or 0:.0f} MiB available"
    yield "disk", f"{info.free_disk_mib:.0f} MiB free in the work folder"
    for name, engine in info.engines.items():
        yield name, _engine_words(engine)
    if info.engines[EngineName.TENSORRT].available:
        yield from _contract_facts(info, contract_of(info))


def _engine_words(engine: EngineInfo) -> str:
    if not engine.available:
        return f"not there: {engine.reason}"
    opset = f", ONNX opset up to {engine.max_opset}" if engine.max_opset else ""
    providers = f", {', '.join(engine.providers)}" if engine.providers else ""
    return f"{engine.version}{' (a test double: it builds nothing)' * engine.double}{opset}{providers}"


def _contract_facts(info: TargetInfo, contract: Contract) -> Iterator[tuple[str, str]]:
    """What TensorRT can do there; a fact from a table says where the table has it from."""
    if info.jetpack or contract.jetpack:
        yield "JetPack", _jetpack_words(info.jetpack, contract.jetpack)
    if contract.parser:
        yield "ONNX opset", f"up to {contract.parser.max_opset} ({contract.parser.source})"
    yield "precisions", ", ".join(p for p in Precision if p not in contract.refused)
    for precision, reason in contract.refused.items():
        yield f"not {precision}", reason
    yield "DLA cores", str(contract.dla_cores)
    yield "trtexec", info.trtexec or "not there"
    if info.power and info.power.total:
        yield "power", info.power.words
    elif contract.board and contract.board.rails:
        total = f", of which {contract.board.total_rail} is all" if contract.board.total_rail else ""
        yield "power rails", f"{', '.join(contract.board.rails)}{total} ({contract.board.source})"
    if info.power_modes:
        yield "power modes", f"{', '.join(info.power_modes)}; {info.power_mode} is set"
    elif contract.board:
        yield "power modes", f"{', '.join(contract.board.power_modes)} ({contract.board.source})"


def _jetpack_words(told: str | None, known: JetPack | None) -> str:
    """The release that the probe told or the table has, and what the table says it brings."""
    if known is None:
        return told or ""
    brings = f"Python {known.python}, TensorRT {known.tensorrt}, CUDA {known.cuda}"
    return f"{told or known.name}, which brings {brings} ({known.source})"


def trust_target(target: Target, *, assume_yes: bool) -> int:
    """Shows the host key's fingerprint, and records it once a person says that it is the right one."""
    key = fetch_host_key(target)
    print(f"{key.hostname} shows this {key.kind} host key:\n\n    {key.fingerprint}\n")
    print("Compare it with what the device itself says: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
    if not assume_yes and not _confirmed("Is it the same? [y/N] "):
        return 3
    print(f"Recorded in {record_host_key(key)}.")
    return 0


def _confirmed(question: str) -> bool:
    try:
        answer = input(question)
    except EOFError:
        print("\nNobody is here to answer, so nothing is recorded: use --yes after comparing.")
        return False
    if answer.strip().lower() in {"y", "yes"}:
        return True
    print("Nothing recorded.")
    return False
