"""What an engine is made of, as TensorRT's inspector tells it, and what each layer takes, as its profiler does."""

import json
from typing import Any, Callable, Dict, List, Optional, Tuple

from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import bindings, logger

#: A layer's name and its milliseconds, in the order of execution.
Times = List[Tuple[str, float]]


def engine_information(engine: Any, context: Any) -> Optional[Dict[str, Any]]:
    """The inspector's JSON; open shapes are as the context has them. None where there is no inspector (8.0)."""
    layout = bindings.member("LayerInformationFormat", "JSON")
    if layout is not None and bindings.has(engine, "create_engine_inspector"):
        return _read(engine.create_engine_inspector(), context, layout)
    return None


def _read(inspector: Any, context: Any, layout: Any) -> Optional[Dict[str, Any]]:
    if bindings.has(inspector, "execution_context") and bindings.has(inspector, "get_engine_information"):
        inspector.execution_context = context
        return parsed(inspector.get_engine_information(layout))
    return None


def parsed(text: str) -> Dict[str, Any]:
    try:
        return dict(json.loads(text, strict=False))
    except ValueError as exc:
        raise DeviceError("TensorRT's inspector gave no JSON ({}): {}...".format(exc, text[:200]))


def layer_times(
    context: Any, enqueue: Callable[[], Any], synchronize: Callable[[], Any], runs: int
) -> List[Times]:
    """The layers' times of each of so many runs, which wait for each other: their sum is more than a query's time."""
    profiler = _profiler()
    context.profiler = profiler
    if bindings.has(context, "enqueue_emits_profile"):
        context.enqueue_emits_profile = False
    return [_one_run(context, profiler, enqueue, synchronize) for _ in range(runs)]


def _one_run(
    context: Any, profiler: Any, enqueue: Callable[[], Any], synchronize: Callable[[], Any]
) -> Times:
    """8.0 reports while it enqueues; later versions when they are asked to."""
    profiler.times = []
    enqueue()
    synchronize()
    if bindings.has(context, "report_to_profiler"):
        _check_reported(context.report_to_profiler())
    return list(profiler.times)


def _check_reported(reported: bool) -> None:
    if not reported:
        words = "; ".join(logger.shared().messages.errors()) or "nothing"
        raise DeviceError("TensorRT could not report its layers' times. It says: {}".format(words))


def _profiler() -> Any:
    trt = bindings.module()

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times = []  # type: Times

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, float(ms)))

    return Profiler()
