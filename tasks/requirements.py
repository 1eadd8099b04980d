"""What a recipe asks of a target's engines, held against what they can do. Each problem names the key to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from jetway.configs.schema import Backend, EngineName, Precision, Provider, Recipe, Target, Variant
from jetway.tasks.contract import (
    DLA_AGAIN,
    FP16_SCALES_OPSET,
    NO_DLA_FROM,
    OLDEST_TENSORRT,
    Contract,
    contract_of,
    dotted,
)
from jetway.tasks.engine_options import runs_on_dla
from jetway.tasks.target_info import EngineInfo, TargetInfo

#: Options that came with TensorRT 8.6, with the value that asks for nothing.
SINCE_8_6 = {
    "optimization_level": None,
    "max_aux_streams": None,
    "hardware_compatibility": None,
    "version_compatible": False,
}
#: What a build needs besides its workspace: TensorRT's libraries, the network and the kernels tried.
BUILD_MIB = 512

# Measured on x86: fp16 took 1.35 times as long as fp32.
_ORT_CPU_FLOAT = "ONNX Runtime's CPU provider computes {} in fp32, with casts on top"
_ORT_CUDA_INT8 = "ONNX Runtime's CUDA provider has no int8 kernels and would compute its Q/DQ in fp32"


def engine_problems(recipe: Recipe, target: Target, info: TargetInfo) -> Iterator[str]:
    """All that stands between the recipe's variants and the engines that they name on this target."""
    variants: dict[Backend, list[Variant]] = {}
    for variant in recipe.variants:
        variants.setdefault(target.backend(variant), []).append(variant)
    for backend, own in variants.items():
        engine = info.engines[backend.engine]
        if not engine.available:
            yield f"engine: {backend.engine} is not there for {target.python}. {engine.reason}"
        elif backend.engine is EngineName.ONNXRUNTIME:
            yield from _onnxruntime_problems(recipe, backend, own, engine, contract_of(info))
        else:
            yield from _tensorrt_problems(recipe, own, engine, contract_of(info))
            yield from _memory_problems(recipe, info)
    if any(backend.uses_gpu for backend in variants) and not target.own_backend.uses_gpu:
        yield (
            "engine: variants of this recipe use the GPU, and the lease of this target is its CPU's. Set engine: "
            "tensorrt, or put a GPU's provider first in providers."
        )


def power_mode_problems(recipe: Recipe, target: Target, info: TargetInfo) -> Iterator[str]:
    """A mode is asked for by name, and boards have different ones; setting it, or the clocks, needs root."""
    mode, key = target.power_settings(recipe.benchmark)["power_mode"], "power_mode"
    if recipe.benchmark.power_mode:
        key = "benchmark.power_mode"
    if mode is None or mode in info.power_modes:
        if info.power_problem:
            yield f"power_mode, lock_clocks: {info.power_problem}"
        return
    known = f"it has {', '.join(info.power_modes)}" if info.power_modes else "nvpmodel lists none there"
    yield f"{key}: {mode} is no power mode of this board; {known}. Name one of its own, or leave the key out."


def power_problems(recipe: Recipe, info: TargetInfo) -> Iterator[str]:
    """The power pass needs something that measures power; tegrastats may, which only running it shows."""
    power = info.power
    if recipe.benchmark.power and power and power.total is None and not power.tegrastats:
        yield (
            "benchmark.power: nothing that measures power can be read there: no INA sensor, no tegrastats, no NVML. "
            "Leave it out for this target."
        )


def trtexec_problems(recipe: Recipe, info: TargetInfo) -> Iterator[str]:
    if recipe.benchmark.trtexec and info.trtexec is None:
        yield (
            "benchmark.trtexec: there is no trtexec on this target. On a Jetson it comes with libnvinfer-bin; pip's "
            "tensorrt has none: install it, or set benchmark.trtexec=false."
        )


def profile_problems(recipe: Recipe, example: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Optimization profiles against the workload's example inputs, whose first dimension alone may be open."""
    for number, profile in enumerate(recipe.tensorrt.profiles):
        key = f"tensorrt.profiles.{number}"
        wrong = sorted(set(profile) ^ set(example))
        if wrong:
            yield f"{key}: {', '.join(wrong)}: every input once, please. The inputs are {', '.join(example)}."
        for name in set(profile) & set(example):
            shapes, batch, rest = profile[name], example[name][0], tuple(example[name][1:])
            if {shape[1:] for shape in (shapes.min, shapes.opt, shapes.max)} != {rest}:
                yield (
                    f"{key}.{name}: behind the batch, every shape must be {list(rest)}, as the workload's "
                    "example_inputs are: only the batch is exported open."
                )
            elif not shapes.min[0] <= batch <= shapes.max[0]:
                yield f"{key}.{name}: the batch of example_inputs, {batch}, must lie between min and max."


def _onnxruntime_problems(
    recipe: Recipe, backend: Backend, variants: Iterable[Variant], engine: EngineInfo, contract: Contract
) -> Iterator[str]:
    missing = [str(provider) for provider in backend.providers if provider not in engine.providers]
    if missing:
        yield (
            f"providers: this onnxruntime has no {', '.join(missing)}, only {', '.join(engine.providers)}. Install "
            "a build that has it, or change providers and the engines that variants name."
        )
    if engine.max_opset is not None and recipe.export.opset > engine.max_opset:
        yield _opset_problem(recipe, f"onnxruntime {engine.version}", engine.max_opset)
    for variant in variants:
        reason = _onnxruntime_refuses(variant.precision, backend)
        if not reason and backend.takes_tensorrt_onnx:
            reason = contract.refused.get(variant.precision, "")
        if reason:
            yield f"variants: {variant.name}: {reason}. Leave it out for this target."


def _onnxruntime_refuses(precision: Precision, backend: Backend) -> str:
    if precision is Precision.INT8_CALIBRATED:
        return "only TensorRT itself has a calibrator"
    if precision is Precision.INT8_DYNAMIC and backend.uses_gpu:
        return "dynamic quantization is for ONNX Runtime on a CPU"
    if backend.takes_tensorrt_onnx:
        return ""
    if precision is Precision.BF16 or (precision is Precision.FP16 and not backend.uses_gpu):
        return _ORT_CPU_FLOAT.format(precision) if not backend.uses_gpu else "bf16 is for TensorRT alone"
    on_cuda = backend.providers[:1] == (Provider.CUDA,)
    return _ORT_CUDA_INT8 if precision.has_quantizers and on_cuda else ""


def _tensorrt_problems(
    recipe: Recipe, variants: list[Variant], engine: EngineInfo, contract: Contract
) -> Iterator[str]:
    version = contract.tensorrt or ()
    if version < OLDEST_TENSORRT:
        yield f"engine: TensorRT {engine.version} is too old; {dotted(OLDEST_TENSORRT)} is the oldest that works."
        return
    if contract.parser and recipe.export.opset > contract.parser.max_opset:
        yield _opset_problem(
            recipe, f"TensorRT {engine.version}", contract.parser.max_opset, contract.parser.source
        )
    for variant in variants:
        reason = contract.refused.get(variant.precision)
        if reason:
            yield f"variants: {variant.name}: {reason}. Leave it out for this target."
    yield from _option_problems(recipe, variants, engine, contract)
    yield from _shape_problems(recipe)
    yield from _dla_problems(recipe, variants, contract)


def _opset_problem(recipe: Recipe, engine: str, limit: int, source: str = "") -> str:
    by = f" ({source})" if source else ""
    return (
        f"export.opset: {recipe.export.opset} is too new for {engine}, which takes up to {limit}{by}. Set "
        f"export.opset={limit}, or install a newer one."
    )


def _option_problems(
    recipe: Recipe, variants: list[Variant], engine: EngineInfo, contract: Contract
) -> Iterator[str]:
    config, version = recipe.tensorrt, contract.tensorrt or ()
    for key, nothing in SINCE_8_6.items():
        if version < (8, 6) and getattr(config, key) != nothing:
            yield f"tensorrt.{key}: TensorRT {engine.version} does not have it; it came with 8.6. Leave it out."
    unknown = [name for name in config.tactic_sources or () if name not in engine.tactic_sources]
    if unknown and engine.tactic_sources:
        yield (
            f"tensorrt.tactic_sources: TensorRT {engine.version} has no {', '.join(unknown)}. It has "
            f"{', '.join(engine.tactic_sources)}."
        )
    quantized = any(variant.precision.has_quantizers for variant in variants)
    by_file = version >= (10,) and recipe.export.opset < FP16_SCALES_OPSET
    if quantized and config.int8_rest == "fp16" and by_file:
        yield (
            f"tensorrt.int8_rest: from TensorRT 10 on the ONNX file carries fp16, and its Q/DQ can from opset "
            f"{FP16_SCALES_OPSET} on. Set export.opset={FP16_SCALES_OPSET}, or tensorrt.int8_rest=fp32."
        )


def _shape_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.export.dynamic_batch and not recipe.tensorrt.profiles:
        yield (
            "tensorrt.profiles: export.dynamic_batch leaves the batch open, and TensorRT must know which shapes will "
            "come. Give min, opt and max of every input, or set export.dynamic_batch=false."
        )


def _dla_problems(recipe: Recipe, variants: list[Variant], contract: Contract) -> Iterator[str]:
    dla, version = recipe.tensorrt.dla, contract.tensorrt or ()
    if dla is None:
        return
    gone = NO_DLA_FROM <= version < DLA_AGAIN
    if gone or dla.core >= contract.dla_cores:
        board = f" of the {contract.board.name}" if contract.board else ""
        yield (
            f"tensorrt.dla: core {dla.core} is asked for, and TensorRT {dotted(version)}{board} has "
            f"{0 if gone else contract.dla_cores} DLA cores. Leave tensorrt.dla out."
        )
    if any(shapes.min != shapes.max for profile in recipe.tensorrt.profiles for shapes in profile.values()):
        yield (
            "tensorrt.dla: a DLA takes one shape. Set min, opt and max of tensorrt.profiles to the same, or leave "
            "tensorrt.dla out."
        )
    for variant in variants:
        if variant.precision.has_quantizers and version < NO_DLA_FROM:
            yield (
                f"variants: {variant.name}: the DLA of TensorRT {dotted(version)} takes no Q/DQ. Use "
                f"{variant.stage}-{Precision.INT8_CALIBRATED} on this target, or leave tensorrt.dla out."
            )
    if not any(runs_on_dla(variant.precision) for variant in variants):
        yield "tensorrt.dla: a DLA computes fp16 and int8, and no variant of this recipe is either. Leave it out."


def _memory_problems(recipe: Recipe, info: TargetInfo) -> Iterator[str]:
    memory = info.memory_mib
    if memory.available is None:
        return
    least = recipe.tensorrt.workspace_mib[-1] + BUILD_MIB
    free = memory.available + (memory.swap_free or 0.0)
    if free < least:
        yield (
            f"tensorrt.workspace_mib: its smallest rung, {recipe.tensorrt.workspace_mib[-1]} MiB, and {BUILD_MIB} MiB "
            f"for the builder itself are more than the {free:.0f} MiB of memory and swap that are free. Add swap on "
            "the target, stop what else runs there, or end tensorrt.workspace_mib with a smaller rung."
        )
