"""The layers of an engine in one table: what each is, from the inspector, and its time, from the profiler.

The inspector has two schemas: TensorRT 8 and 10 tell a tensor's format and type in one text, 11 in two. An engine
that was built without detailed layers has names alone.
"""

import collections
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

from jetway.tasks.on_device import sessions, statistics

RUNS = 50
WARMUP_RUNS = 10
#: TensorRT's words for a type, the longer ones first where one holds another.
TYPES = (
    ("bf16", r"BF16|BFloat16"),
    ("fp16", r"FP16|Half|Float16"),
    ("fp8", r"FP8\w*|Float8\w*"),
    ("fp4", r"FP4\w*"),
    ("fp32", r"FP32|Float32|Float"),
    ("uint8", r"UInt8"),
    ("int8", r"Int8"),
    ("int4", r"Int4"),
    ("int32", r"Int32"),
    ("int64", r"Int64"),
    ("bool", r"Bool"),
)
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

Json = Dict[str, Any]
Times = Sequence[Sequence[Tuple[str, float]]]


def measure(entry: Json) -> List[Json]:
    """The table of a checked entry's engine, each layer timed over ``RUNS`` queries."""
    session, inputs = sessions.opened_with_inputs(entry)
    try:
        information, times = session.layers(inputs, WARMUP_RUNS + RUNS)
    finally:
        session.close()
    return table(information, times[WARMUP_RUNS:])


def table(information: Optional[Json], times: Times) -> List[Json]:
    """Rows in the order of execution; those that the profiler does not name come last, without a time.

    ``time_ms`` is the median over the runs, ``share_ratio`` its share of the sum of all.
    """
    described = collections.defaultdict(collections.deque)  # type: Any
    for layer in (information or {}).get("Layers", []):
        row = describe(layer)
        described[row["name"]].append(row)
    timed = []
    for name, time_ms in median_times(times):
        row = described[name].popleft() if described[name] else _nameless(name)
        timed.append(dict(row, time_ms=time_ms))
    untimed = [dict(row, time_ms=None) for rows in described.values() for row in rows]
    return with_shares(timed + untimed)


def median_times(times: Times) -> List[Tuple[str, float]]:
    """Each layer's median. A name that comes twice in a run is two layers, told apart by their order."""
    samples = collections.OrderedDict()  # type: Any
    for run in times:
        seen = collections.Counter()  # type: Any
        for name, time_ms in run:
            samples.setdefault((name, seen[name]), []).append(time_ms)
            seen[name] += 1
    return [(name, statistics.median(values)) for (name, _), values in samples.items()]


def with_shares(rows: List[Json]) -> List[Json]:
    total_ms = sum(row["time_ms"] or 0.0 for row in rows)
    return [
        dict(
            row,
            share_ratio=row["time_ms"] / total_ms if total_ms and row["time_ms"] is not None else None,
        )
        for row in rows
    ]


def _nameless(name: str) -> Json:
    return {
        "name": name,
        "type": None,
        "precision": None,
        "format": None,
        "onnx_nodes": [],
        "tactic": None,
        "inputs": [],
        "outputs": [],
    }


def describe(layer: Any) -> Json:
    """One layer of the inspector, in either schema; a text is all there is of one without detail."""
    if isinstance(layer, str):
        return _nameless(layer)
    inputs = [_tensor(tensor) for tensor in layer.get("Inputs", [])]
    outputs = [_tensor(tensor) for tensor in layer.get("Outputs", [])]
    return {
        "name": layer.get("Name", ""),
        "type": layer.get("LayerType"),
        "precision": _precision(layer, inputs, outputs),
        "format": outputs[0]["format"] if outputs else None,
        "onnx_nodes": ONNX_NODE.findall(layer.get("Metadata") or ""),
        "tactic": layer.get("TacticName"),
        "inputs": inputs,
        "outputs": outputs,
    }


def _tensor(tensor: Json) -> Json:
    """Format and type, which the older schema has in one text."""
    joined = tensor.get("Format/Datatype")
    told = joined if joined is not None else tensor.get("DataType", tensor.get("Datatype"))
    return {
        "name": tensor.get("Name"),
        "shape": tensor.get("Dimensions"),
        "dtype": data_type(told),
        "format": joined if joined is not None else tensor.get("Format"),
    }


def data_type(text: Optional[str]) -> Optional[str]:
    """Our name of the type in TensorRT's words; None where they name none, as for shapes that are still open."""
    for name, pattern in TYPES:
        if re.search(r"\b(?:{})\b".format(pattern), text or "", re.IGNORECASE):
            return name
    return None


def _precision(layer: Json, inputs: List[Json], outputs: List[Json]) -> Optional[str]:
    """The type of its weights, where it has some; else of its tensors, ``mixed`` where they differ."""
    weights = layer.get("Weights")
    told = data_type(weights.get("Type")) if isinstance(weights, dict) else None
    if told:
        return told
    found = {tensor["dtype"] for tensor in inputs + outputs if tensor["dtype"]}
    if len(found) > 1:
        return "mixed"
    return found.pop() if found else None
