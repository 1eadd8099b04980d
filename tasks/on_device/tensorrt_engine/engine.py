"""TensorRT behind the interface of ``engines``."""

from typing import Any, Callable, Dict, List, Optional

from jetway.tasks.on_device import gpu, machine
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import bindings, execution, ladder, logger, options, precision

NAME = "tensorrt"
Session = execution.Session


def version() -> str:
    return str(bindings.module().__version__)


def facts() -> Dict[str, Any]:
    """What this TensorRT can do, and with how many DLA cores. A GPU that does not answer is said."""
    try:
        trt = bindings.module()
    except DeviceError as exc:
        return {"available": False, "reason": str(exc)}
    return dict(
        _gpu_facts(),
        available=True,
        version=trt.__version__,
        double=bindings.is_double(),
        precisions=precisions(),
        strongly_typed=bindings.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") is not None,
        weakly_typed=precision.has_flags(),
        tactic_sources=sorted(trt.TacticSource.__members__),
        optimization_level=bindings.has(trt.IBuilderConfig, "builder_optimization_level"),
    )


def precisions() -> List[str]:
    """Those that a build can be asked for; what the GPU is fast at is another matter."""
    trt = bindings.module()
    bf16 = bindings.member("DataType", "BF16") is not None
    calibrated = bindings.has(trt, "IInt8EntropyCalibrator2")
    absent = ([] if bf16 else ["bf16"]) + ([] if calibrated else ["int8-calibrated"])
    return [name for name in options.PRECISIONS if name not in absent]


def _gpu_facts() -> Dict[str, Any]:
    try:
        return {"gpu": gpu.identity(), "dla_cores": dla_cores()}
    except DeviceError as exc:
        return {"gpu": None, "dla_cores": None, "gpu_reason": str(exc)}


def dla_cores() -> Optional[int]:
    try:
        return int(bindings.module().Runtime(logger.shared()).num_DLA_cores)
    except TypeError:  # a null pointer, when TensorRT does not start
        return None


def build_options(request: Dict[str, Any]) -> Dict[str, Any]:
    return options.recorded(options.normalised(request))


def load_options(request: Dict[str, Any]) -> Dict[str, Any]:
    return options.for_loading(options.normalised(request))


def platform_facts(load_options: Dict[str, Any]) -> Dict[str, Any]:
    """What an engine built here depends on."""
    found = {
        "engine": NAME,
        "engine_version": version(),
        "architecture": machine.cpu()["architecture"],
        "gpu": gpu.identity(),
        "board": machine.board(),
        "l4t": machine.l4t_release(),
        "dla_core": load_options["dla_core"],
    }
    return dict(found, double=True) if bindings.is_double() else found


def build(
    request: Dict[str, Any], engine_path: str, progress: Callable[[Dict[str, Any]], None]
) -> Dict[str, Any]:
    """Builds on the ladder of workspace limits. Raises DeviceError with its cause."""
    asked = options.normalised(request)
    return ladder.build(
        {
            "onnx": request["onnx"],
            "inputs": request["inputs"],
            "options": asked,
            "platform": platform_facts(options.for_loading(asked)),
            "work_dir": request["work_dir"],
            "engine_path": engine_path,
        },
        progress,
    )


def inspect(engine_path: str, load_options: Dict[str, Any], inputs: Dict[str, Any]) -> Dict[str, Any]:
    """Nothing yet that the build did not say; layers are looked into when they are timed."""
    return {}
