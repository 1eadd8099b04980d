"""INT8 fake quantization by NVIDIA ModelOpt: insert quantizers, calibrate them, save and reload them.

Weights are int8, symmetric, one range an output channel; activations are int8, symmetric, one range a tensor.
Quantizers sit where TensorRT wants them, on the input and the weight of every convolution and linear layer
and nowhere else: what an engine needs besides (the skip of a residual add, the output of a convolution) is
added in ONNX, by ``lowering``, because a functional ``x + y`` has no module to hang a quantizer on.
BatchNorm stays a layer of its own, and is folded after export.

A quantized checkpoint holds the ranges as tensors (``conv1.input_quantizer._amax``) beside the weights, and
in its metadata the record: ``{"schema_version": 1, "quantizers": {"conv1.weight_quantizer": {"axis": 0}}}``.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jetway.configs.schema import (
    DEFAULT_CALIBRATION_SET,
    CalibrationMethod,
    Precision,
    QatConfig,
    Section,
)
from jetway.tasks.artifacts import Checkpoint
from jetway.tasks.calibration import calibration_set
from jetway.tasks.checkpoint import build_network, checkpoint_record, load_network, load_weights, read_tensors
from jetway.tasks.errors import ArtifactError, ConfigError, QuantizationError
from jetway.tasks.smoothing import NOTHING_TO_SMOOTH, smooth_linear_layers
from jetway.tasks.store import Store
from jetway.tasks.workload import Inputs, Workload, batches, call_network

logger = logging.getLogger("jetway")

SCHEMA_VERSION = 1
NUM_BITS = 8

_CALIBRATION_BATCH = 32
# Bins between two candidate ranges of the entropy search; 8 of 2048 moves a range by 0.4 % at most.
_ENTROPY_STRIDE = 8
# Likewise between two ranges of the search by squared error.
_MSE_STRIDE = 8

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_FROM_HISTOGRAMS = (CalibrationMethod.ENTROPY, CalibrationMethod.PERCENTILE, CalibrationMethod.MSE)
_WHERE_TO_LOOK = {
    "input": " on the calibration data. Look for NaN or infinity in calibration_data(), then at the layers before it.",
    "weight": ". Look at the loss of the training that gave it, and train again.",
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class CalibrationSection(Section):
    """The part of the recipe's ``qat`` section that decides the ranges."""

    revision: int = 1
    calibration: CalibrationMethod
    percentile: float
    calibration_samples: int
    calibration_set: str = DEFAULT_CALIBRATION_SET
    keep_float: tuple[str, ...]


def calibration_section(config: QatConfig) -> CalibrationSection:
    """What PTQ uses of the ``qat`` section."""
    return CalibrationSection(**{key: getattr(config, key) for key in CalibrationSection.model_fields})


def quantize_network(
    network: nn.Module, workload: Workload, section: CalibrationSection, *, device: str = "cpu"
) -> nn.Module:
    """Quantizes ``network`` in place, calibrated on the workload's calibration data; returns it in eval mode.

    A layer that no calibration sample reaches, or whose input is always zero there, or at the percentile that is
    asked for, stays in float. Raises ConfigError when a ``keep_float`` pattern matches no module,
    QuantizationError when there are no calibration data, nothing to quantize, or a range that is not finite.
    """
    kept = matching_modules(network, section.keep_float, key="qat.keep_float")
    layers = [name for name in quantizable_layers(network) if not _is_within(name, kept)]
    if not layers:
        raise QuantizationError(
            "There is nothing to quantize: every convolution and linear layer is kept in float. "
            "Shorten qat.keep_float, or leave the int8 variants out of the recipe."
        )
    network.to(device).eval()
    if section.calibration is CalibrationMethod.SMOOTHQUANT:
        _smooth(network, workload, section, device)
    _insert_quantizers(network)
    _enable(network, layers, histogram=section.calibration in _FROM_HISTOGRAMS)
    network.to(device)
    _collect(network, _calibration_inputs(workload, section, device), workload)
    _set_ranges(network, layers, section)
    return network.to("cpu")


def quantizable_layers(network: nn.Module) -> list[str]:
    """Names of the layers that get quantizers: plain convolutions and linear layers."""
    return [name for name, module in network.named_modules() if type(module) in _LAYERS]


def input_quantizers(network: nn.Module) -> dict[str, Any]:
    """The input quantizers that are on, by their layers' names."""
    suffix = ".input_quantizer"
    return {
        name.removesuffix(suffix): q
        for name, q in _quantizers(network)
        if q.is_enabled and name.endswith(suffix)
    }


def matching_modules(network: nn.Module, patterns: Iterable[str], *, key: str) -> set[str]:
    """Names of the modules that match any of the patterns; ``key`` names the setting in an error."""
    names = [name for name, _ in network.named_modules() if name]
    matched = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f"{key}: no module matches {pattern!r}. {_nearest(pattern, names)}")
        matched.update(found)
    return matched


def quantization_record(network: nn.Module) -> dict[str, Any]:
    """Which quantizers are on, and along which axis; their ranges are tensors of the network."""
    return {
        "schema_version": SCHEMA_VERSION,
        "num_bits": NUM_BITS,
        "quantizers": {name: {"axis": q.axis} for name, q in _quantizers(network) if q.is_enabled},
    }


def load_quantized_network(workload: Workload, checkpoint: Checkpoint, store: Store) -> nn.Module:
    """The fake-quantized network of a checkpoint, in eval mode, on the CPU.

    Raises ArtifactError when the file is missing, corrupt, not quantized, or does not fit the network.
    """
    path = store.open(checkpoint)
    if checkpoint_record(path).quantization is None:
        raise ArtifactError(
            f"checkpoint {checkpoint.sha256[:12]} is not quantized: load it with checkpoint.load_network."
        )
    return read_network(workload, path)


def read_network(workload: Workload, path: Path) -> nn.Module:
    """The network of a checkpoint file, fake-quantized if its record says so, in eval mode, on the CPU."""
    record, tensors = checkpoint_record(path), read_tensors(path)
    network = build_network(workload, record.structure)
    if record.quantization is not None:
        _restore_quantizers(network, record.quantization, tensors)
    load_weights(network, tensors, source=str(path))
    return network.eval()


def load_variant(workload: Workload, checkpoint: Checkpoint, precision: Precision, store: Store) -> nn.Module:
    """The network of a checkpoint, fake-quantized for an int8 precision."""
    load = load_quantized_network if precision.has_quantizers else load_network
    return load(workload, checkpoint, store)


def without_quantizers(network: nn.Module) -> nn.Module:
    """A copy that computes in float."""
    floating = copy.deepcopy(network)
    for _, quantizer in _quantizers(floating):
        quantizer.disable()
    return floating


def _modelopt() -> Any:
    """ModelOpt's quantization package, imported on first use: that takes seconds.

    On import it calls parts of PyTorch that are deprecated, and its plugins miss packages we do not use.
    It reports on stdout, which belongs to our caller, so its report goes to the debug log.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit\b")
        warnings.filterwarnings("ignore", module=r"modelopt\b")
        package = importlib.import_module("modelopt.torch.quantization")
        importlib.import_module("modelopt.torch.quantization.conversion").__dict__["print"] = logger.debug
    return package


def _insert_quantizers(network: nn.Module) -> None:
    """Gives every module that ModelOpt knows its quantizers, all of them off."""
    off = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}
    _modelopt().quantize(network, off)


def _quantizers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = _modelopt().nn.TensorQuantizer
    return ((name, module) for name, module in network.named_modules() if isinstance(module, kind))


def _enable(network: nn.Module, layers: list[str], *, histogram: bool) -> None:
    """Turns on the weight and the input quantizer of each layer."""
    for name in layers:
        layer = network.get_submodule(name)
        _configure(layer.get_submodule("weight_quantizer"), axis=_channel_axis(layer), calibrator="max")
        calibrator = _histogram_calibrator() if histogram else "max"
        _configure(layer.get_submodule("input_quantizer"), axis=None, calibrator=calibrator)


def _histogram_calibrator() -> Any:
    """Our calibrator, imported on first use because it derives from ModelOpt's."""
    _modelopt()
    return importlib.import_module("jetway.tasks.histogram").BoundedHistogramCalibrator


def _configure(quantizer: Any, *, axis: int | None, calibrator: Any) -> None:
    quantizer.set_from_attribute_config(
        {"num_bits": NUM_BITS, "axis": axis, "enable": True, "calibrator": calibrator}
    )


def _channel_axis(layer: nn.Module) -> int:
    """Axis of a weight's output channels."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def _calibration_inputs(workload: Workload, section: CalibrationSection, device: str) -> Iterator[Inputs]:
    data = calibration_set(workload, section.calibration_set)
    for inputs, _ in batches(workload, data, _CALIBRATION_BATCH, limit=section.calibration_samples):
        yield {name: tensor.to(device) for name, tensor in inputs.items()}


def _collect(network: nn.Module, inputs: Iterator[Inputs], workload: Workload) -> None:
    """Runs the float network over the inputs while the quantizers watch."""
    named = {name: q for name, q in _quantizers(network) if q.is_enabled}
    watching = list(named.values())
    hooks = [q.register_forward_pre_hook(_finite_tensor_of(name)) for name, q in named.items()]
    for quantizer in watching:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in inputs:
            call_network(network, batch, workload.output_names)
    for quantizer in watching:
        quantizer.disable_calib()
        quantizer.enable_quant()
    for hook in hooks:
        hook.remove()


def _smooth(network: nn.Module, workload: Workload, section: CalibrationSection, device: str) -> None:
    inputs = list(_calibration_inputs(workload, section, device))
    smoothed = smooth_linear_layers(network, inputs, workload.output_names)
    if not smoothed:
        raise QuantizationError(NOTHING_TO_SMOOTH)
    logger.info("smoothquant: %d linear layers smoothed: %s", len(smoothed), ", ".join(smoothed))


def _finite_tensor_of(quantizer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    layer, _, kind = quantizer.rpartition(".")
    tensor = kind.removesuffix("_quantizer")

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not bool(torch.isfinite(arguments[0]).all()):
            raise QuantizationError(f"The {tensor} of {layer!r} is not finite{_WHERE_TO_LOOK[tensor]}")

    return check


def _set_ranges(network: nn.Module, layers: list[str], section: CalibrationSection) -> None:
    for name in layers:
        inputs: Any = network.get_submodule(f"{name}.input_quantizer")
        weight: Any = network.get_submodule(f"{name}.weight_quantizer")
        amax = _range_of(inputs, name, section)
        if amax is None or float(amax) == 0.0:
            why = _why_float(amax, inputs._calibrator)
            logger.warning("%s stays in float: %s in the calibration data", name, why)
            inputs.disable()
            weight.disable()
        else:
            inputs.amax = amax
            weight.load_calib_amax()


def _why_float(amax: Tensor | None, calibrator: Any) -> str:
    if amax is None:
        return "it is not used"
    counted = getattr(calibrator, "_calib_hist", None)
    return "its input is always 0" if counted is None else "the percentile of its input is 0"


def _range_of(quantizer: Any, layer: str, section: CalibrationSection) -> Tensor | None:
    """The largest magnitude that the layer's input shall represent, or None when it was never called."""
    arguments: dict[CalibrationMethod, dict[str, Any]] = {
        CalibrationMethod.MAX: {},
        CalibrationMethod.ENTROPY: {"method": "entropy", "stride": _ENTROPY_STRIDE},
        CalibrationMethod.PERCENTILE: {"method": "percentile", "percentile": section.percentile},
        CalibrationMethod.MSE: {"method": "mse", "stride": _MSE_STRIDE},
        CalibrationMethod.SMOOTHQUANT: {},
    }
    try:
        amax: Tensor | None = quantizer._calibrator.compute_amax(**arguments[section.calibration])
    except (RuntimeError, ValueError, IndexError) as exc:
        raise QuantizationError(
            f"{section.calibration} calibration of {layer!r} failed: {exc}. Set qat.calibration: max."
        ) from exc
    return amax


def _restore_quantizers(network: nn.Module, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"The quantization record has schema version {version}, this Jetway reads {SCHEMA_VERSION}. "
            "Quantize again, or use the Jetway version that wrote it."
        )
    _insert_quantizers(network)
    for name, attributes in record["quantizers"].items():
        try:
            quantizer: Any = network.get_submodule(name)
            amax = tensors[f"{name}._amax"]
        except (AttributeError, KeyError) as exc:
            raise ArtifactError(
                f"The quantization record names {name!r}, which the workload's network or the file lacks. "
                "The network has changed since it was quantized; quantize it again."
            ) from exc
        _configure(quantizer, axis=attributes["axis"], calibrator="max")
        quantizer.amax = amax


def _is_within(name: str, ancestors: set[str]) -> bool:
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def _nearest(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"Nearest: {', '.join(near)}."
