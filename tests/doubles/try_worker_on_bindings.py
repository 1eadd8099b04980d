"""Runs what of the worker needs no library behind the bindings, on the tensorrt that is on the path: its questions by
name, and its callbacks, called through the bindings' own classes as TensorRT calls them. Writes JSON."""

import inspect
import json
import sys

import tensorrt as trt

from jetway.tasks.on_device.tensorrt_engine import (
    bindings,
    calibration,
    inspector,
    logger,
    precision,
    progress,
    settings,
)

overridden: dict[str, dict[str, list[str]]] = {}


def main() -> None:
    found = {
        "has_flags": precision.has_flags(),
        "mask": settings.tactic_mask(sorted(trt.TacticSource.__members__)),
    }
    found["logged"] = logged()
    found["timed"] = timed()
    if bindings.has(trt, "IProgressMonitor"):
        found["steps"] = stepped()
    if bindings.has(trt, "IInt8EntropyCalibrator2"):
        found["calibrated"] = [calibrated("entropy"), calibrated("minmax")]
    json.dump(dict(found, overridden=overridden), sys.stdout)


def logged() -> list[str]:
    shared = logger.shared()
    overridden["ILogger"] = parameters(shared)
    trt.ILogger.log(shared, trt.Logger.ERROR, "something")
    return list(shared.messages.errors())


def timed() -> list[tuple[str, float]]:
    profiler = inspector._profiler()
    overridden["IProfiler"] = parameters(profiler)
    trt.IProfiler.report_layer_time(profiler, "Conv_0 + Relu_1", 0.5)
    return list(profiler.times)


def stepped() -> list[object]:
    lines: list[dict[str, object]] = []
    steps = progress.Steps(lines.append)
    monitor = progress._subclass(trt.IProgressMonitor, steps)
    overridden["IProgressMonitor"] = parameters(monitor)
    trt.IProgressMonitor.phase_start(monitor, "outer", "", 2)
    goes_on = trt.IProgressMonitor.step_complete(monitor, "outer", 0)
    share = steps.share()
    trt.IProgressMonitor.phase_finish(monitor, "outer")
    return [goes_on, share, steps.share()]


class Feed:
    """Stands for the worker's feed of batches, which needs a GPU."""

    batch_size = 4


def calibrated(algorithm: str) -> list[object]:
    """Of a calibrator's methods, the bindings pass on only this one when Python calls the base's."""
    native = calibration.calibrator(algorithm, Feed())  # type: ignore[arg-type]
    base = type(native).__mro__[1]
    overridden[base.__name__] = parameters(native)
    return [base.__name__, base.get_batch_size(native)]


def parameters(native: object) -> dict[str, list[str]]:
    """Names of what each overriding method takes."""
    methods = {name: value for name, value in vars(type(native)).items() if not name.startswith("_")}
    return {name: list(inspect.signature(value).parameters)[1:] for name, value in methods.items()}


main()
