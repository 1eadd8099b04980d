"""Verify: ONNX Runtime's outputs against PyTorch's, on fixed evaluation inputs.

An int8 model is held against the fake-quantized network that it was exported from. What PTQ only cuts off and rounds,
layers that stay in float give whole, so that outputs may lie anywhere from there to those without quantizers. The
flow verifies the lowered model: one for ONNX Runtime's CPU kernels with all graph optimization, which is what the
target runs, any other without, for what its Q/DQ and casts mean. ONNX Runtime has no bfloat16 kernels for a CPU, so a
bf16 model is run in float32 with every result rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import BACKENDS, Precision, VerifyConfig
from jetway.tasks.artifacts import Checkpoint, OnnxModel, StageOutput
from jetway.tasks.errors import ExportError, ParityError
from jetway.tasks.lowering.float_types import emulate_bf16
from jetway.tasks.onnx_graph import Array, Graph
from jetway.tasks.quantization import load_variant, without_quantizers
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.workload import Inputs, Workload, call_network

Outputs = dict[str, Array]
CPU = BACKENDS["ort-cpu"]


@dataclass(frozen=True)
class Limits:
    """``atol`` is a fraction of the output's largest magnitude, ``rtol`` of each value.

    ``outliers`` is the share of an output's values that may be further off: one at least unless it is 0, never
    all of them.
    """

    atol: float
    rtol: float
    argmax_agreement: float | None
    outliers: float = 0.0

    @classmethod
    def of(cls, config: VerifyConfig, precision: Precision) -> Limits:
        if precision.has_quantizers or precision is Precision.INT8_DYNAMIC:
            return cls(config.int8_atol, config.rtol, config.argmax_agreement, config.int8_outliers)
        atols = {Precision.FP16: config.fp16_atol, Precision.BF16: config.bf16_atol}
        return cls(atols.get(precision, config.atol), config.rtol, config.argmax_agreement)


@dataclass(frozen=True)
class Comparison:
    """How far one output is off. ``excess`` is the worst error that counts as a multiple of what is allowed there,
    ``rms_error_ratio`` the root mean square of all finite errors, as a multiple of the output's standard deviation."""

    output: str
    max_abs_error: float
    rms_error_ratio: float
    largest_magnitude: float
    excess: float
    worst_index: tuple[int, ...]
    expected: float
    actual: float
    allowed: float
    argmax_agreement: float | None


def verify_onnx(
    context: StageContext,
    checkpoint: Checkpoint,
    model: OnnxModel,
    config: VerifyConfig,
    precision: Precision,
) -> StageOutput:
    """A report of how the ONNX model agrees with the network of ``checkpoint``, output by output.

    ``model`` may be as exported or lowered. Raises ParityError beyond the limits, with the worst output,
    ExportError when ONNX Runtime refuses the model.
    """
    network = load_variant(context.workload, checkpoint, precision, context.store)
    session = _session(context.store.open(model), model, precision, context.threads)
    is_partly_float = precision is Precision.INT8_PTQ and bool(model.metadata.get("float_islands"))
    networks = [network, without_quantizers(network)] if is_partly_float else [network]
    expected, actual = _all_outputs(context.workload, networks, session, model, config.samples)
    limits = Limits.of(config, precision)
    comparisons = [
        compare_outputs(
            name,
            nearest(actual[name], [outputs[name] for outputs in expected]),
            actual[name],
            limits,
            with_argmax=index == 0,
        )
        for index, name in enumerate(context.workload.output_names)
    ]
    _check(comparisons, limits, model, precision)
    return _report(context, checkpoint, model, comparisons, limits)


def nearest(values: Array, references: Sequence[Array]) -> Array:
    """What lies between the references, and nearest to the values; the first one for what is not finite."""
    low, high = np.minimum.reduce(references), np.maximum.reduce(references)
    return np.where(np.isfinite(values), np.clip(values, low, high), references[0])


def compare_outputs(
    name: str, expected: Array, actual: Array, limits: Limits, *, with_argmax: bool
) -> Comparison:
    """Compares one output over all samples. A value that is not finite on one side only is infinitely off, and never
    an outlier."""
    reference, value = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(reference) & np.isfinite(value)
    same = (reference == value) | (np.isnan(reference) & np.isnan(value))
    error = np.where(same, 0.0, np.inf)
    np.subtract(value, reference, out=error, where=finite)
    error = np.abs(error)
    largest = float(np.max(np.abs(reference), where=np.isfinite(reference), initial=0.0))
    allowed = limits.atol * largest + limits.rtol * np.where(finite, np.abs(reference), 0.0)
    excess = np.where(error > 0, error / np.maximum(allowed, np.finfo(np.float64).tiny), 0.0)
    worst = _worst_that_counts(excess, limits.outliers)
    agreement = argmax_agreement(reference, value) if with_argmax and reference.ndim > 1 else None
    return Comparison(
        output=name,
        max_abs_error=float(error.max()),
        rms_error_ratio=_rms_error_ratio(error[finite], reference[finite]),
        largest_magnitude=largest,
        excess=float(excess[worst]),
        worst_index=tuple(int(index) for index in worst),
        expected=float(reference[worst]),
        actual=float(value[worst]),
        allowed=float(allowed[worst]),
        argmax_agreement=agreement,
    )


def _rms_error_ratio(error: Array, reference: Array) -> float:
    """0 where nothing is off; of an output that never varies, the error itself."""
    rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
    deviation = float(reference.std()) if reference.size else 0.0
    return rms / deviation if deviation else rms


def _worst_that_counts(excess: Array, outliers: float) -> tuple[np.intp, ...]:
    passed_over = 0 if np.isinf(excess).any() else math.ceil(outliers * excess.size)
    rank = max(0, excess.size - 1 - passed_over)
    return np.unravel_index(np.argpartition(excess, rank, axis=None)[rank], excess.shape)


def argmax_agreement(expected: Array, actual: Array) -> float:
    """Share of positions whose largest class is the same. Classes are the last axis of two or three, as in
    classification and token models, and axis 1 of images."""
    axis = -1 if expected.ndim <= 3 else 1
    return float(np.mean(expected.argmax(axis) == actual.argmax(axis)))


@task(name="verify", cache_policy=NO_CACHE, persist_result=False)
def verify(
    context: StageContext,
    checkpoint: Checkpoint,
    model: OnnxModel,
    config: VerifyConfig,
    precision: Precision,
) -> StageOutput:
    return run_stage(
        context,
        "verify",
        lambda ctx: verify_onnx(ctx, checkpoint, model, config, precision),
        inputs=[checkpoint, model],
        section=config,
    )


def _session(path: Path, model: OnnxModel, precision: Precision, threads: int) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    as_target = model.metadata.get("lowered_for", None if precision.has_quantizers else "") in ("", CPU.name)
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if as_target else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(
            _runnable(path, precision), options, providers=list(CPU.providers)
        )
    except Exception as exc:  # ONNX Runtime's exceptions have no base class of their own
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the exported model: {exc}. Try another "
            "export.opset, or write the operator that it names with other ones."
        ) from exc


def _runnable(path: Path, precision: Precision) -> str | bytes:
    """What ONNX Runtime can run on a CPU."""
    if precision is not Precision.BF16:
        return str(path)
    emulated: bytes = emulate_bf16(Graph.load(path)).to_model().SerializeToString()
    return emulated


def _all_outputs(
    workload: Workload, networks: Sequence[torch.nn.Module], session: Any, model: OnnxModel, samples: int
) -> tuple[list[Outputs], Outputs]:
    """Those of each network, and those of ONNX Runtime."""
    taken = [value.name for value in session.get_inputs()]
    expected: list[list[Outputs]] = [[] for _ in networks]
    actual: list[Outputs] = []
    names = list(workload.output_names)
    for inputs in _input_batches(workload, samples, dynamic=bool(model.metadata.get("dynamic_batch"))):
        for network, found in zip(networks, expected, strict=True):
            with torch.no_grad():
                outputs = call_network(network, inputs, names)
            found.append({name: tensor.numpy() for name, tensor in outputs.items()})
        arrays = {name: inputs[name].numpy() for name in taken}
        actual.append(dict(zip(names, session.run(names, arrays), strict=True)))
    return [_joined(found) for found in expected], _joined(actual)


def _input_batches(workload: Workload, samples: int, *, dynamic: bool) -> Iterator[Inputs]:
    """Evaluation inputs in batches as exported, the last filled up from the start; an open batch dimension
    is tried with another size."""
    data = workload.evaluation_data()
    count = min(samples, len(data))  # type: ignore[arg-type]
    exported = len(next(iter(workload.example_inputs().values())))
    size = 2 * exported + 1 if dynamic else exported
    indices = list(islice(cycle(range(count)), -(-count // size) * size))
    for start in range(0, len(indices), size):
        yield workload.collate([data[index] for index in indices[start : start + size]])[0]


def _joined(batches: list[Outputs]) -> Outputs:
    """Outputs of all batches; those of no dimension stand side by side."""
    return {name: np.concatenate([np.atleast_1d(batch[name]) for batch in batches]) for name in batches[0]}


def _check(comparisons: list[Comparison], limits: Limits, model: OnnxModel, precision: Precision) -> None:
    worst = max(comparisons, key=lambda comparison: comparison.excess)
    if worst.excess > 1:
        raise ParityError(
            f"{_described(model)} disagrees with PyTorch in output {worst.output!r}: "
            f"at {list(worst.worst_index)} it gives {worst.actual:.6g}, PyTorch {worst.expected:.6g}; "
            f"allowed is {worst.allowed:.3g} ({limits.atol:g} of the largest magnitude "
            f"{worst.largest_magnitude:.4g}, and {limits.rtol:g} of the value{_outliers(limits)}). "
            f"{_advice(precision)}",
            output=worst.output,
            max_abs_error=worst.max_abs_error,
        )
    agreement = comparisons[0].argmax_agreement
    if limits.argmax_agreement is not None and agreement is not None and agreement < limits.argmax_agreement:
        raise ParityError(
            f"{_described(model)} and PyTorch choose the same class of output {comparisons[0].output!r} in "
            f"{agreement:.2%} of the cases; verify.argmax_agreement asks for {limits.argmax_agreement:.2%}. "
            f"{_advice(precision)}",
            output=comparisons[0].output,
            max_abs_error=comparisons[0].max_abs_error,
        )


def _outliers(limits: Limits) -> str:
    return f"; {limits.outliers:g} of the values may be further off" if limits.outliers else ""


def _described(model: OnnxModel) -> str:
    engine = model.metadata.get("lowered_for")
    return f"The ONNX model lowered for {engine}" if engine else "The ONNX model"


def _advice(precision: Precision) -> str:
    if precision in (Precision.FP16, Precision.BF16):
        return (
            f"Keep the layers before that output in fp32 with tensorrt.mixed, or raise verify.{precision}_atol "
            "if accuracy holds."
        )
    if not precision.has_quantizers:
        return (
            "Look for what the export froze: a branch or a size that depends on the input's values. "
            "If the difference is harmless, raise verify.atol."
        )
    return (
        "Name the layers before that output in qat.keep_float, calibrate with more qat.calibration_samples "
        "or another qat.calibration, or raise verify.int8_atol if accuracy holds."
    )


def _report(
    context: StageContext,
    checkpoint: Checkpoint,
    model: OnnxModel,
    comparisons: list[Comparison],
    limits: Limits,
) -> StageOutput:
    parents = (checkpoint.sha256, model.sha256)
    document: Mapping[str, Any] = {
        "model": model.sha256,
        "lowered_for": model.metadata.get("lowered_for"),
        "limits": asdict(limits),
        "outputs": [_to_json(comparison) for comparison in comparisons],
    }
    metrics = {
        "parity_excess": max(comparison.excess for comparison in comparisons),
        "parity_rms_error_ratio": max(comparison.rms_error_ratio for comparison in comparisons),
    }
    if comparisons[0].argmax_agreement is not None:
        metrics["argmax_agreement"] = comparisons[0].argmax_agreement
    return StageOutput(handle=context.store.add_json(document, parents=parents), metrics=metrics)


def _to_json(comparison: Comparison) -> dict[str, Any]:
    """JSON has no infinity, which a masked logit may be on both sides."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in asdict(comparison).items()
    }
