"""NVIDIA's trtexec: found on the target, run on an engine with flags that mean the same on every version, and read.

TensorRT 11 turned its defaults round (CUDA graph, no transfers, busy wait), so every choice is spelled out, by the
flags that this trtexec's own help names.
"""

import json
import os
import re
import shutil
import subprocess
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from jetway.tasks.on_device import errors, float32, layers, machine, outputs
from jetway.tasks.on_device.errors import DeviceError

USUAL_PATH = "/usr/src/tensorrt/bin/trtexec"
# Loading an engine takes long on a small board, and longer than the measurement.
EXTRA_TIMEOUT_S = 600.0
HELP_TIMEOUT_S = 60.0
#: The lines of the summary, as our own report names them.
METRICS = {
    "Latency": "latency_ms",
    "End-to-End Host Latency": "end_to_end_ms",
    "Enqueue Time": "enqueue_ms",
    "H2D Latency": "h2d_ms",
    "GPU Compute Time": "gpu_compute_ms",
    "D2H Latency": "d2h_ms",
}
TIMES = {"latencyMs": "latency_ms", "h2dMs": "h2d_ms", "computeMs": "gpu_compute_ms", "d2hMs": "d2h_ms"}
#: What is held against our own figures.
COMPARED = ("gpu_compute_ms", "latency_ms", "h2d_ms", "d2h_ms")

NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan)"
LINE = re.compile(r"^(?:\[[^\]]*\] )?\[(?P<level>[A-Z])\] (?P<text>.*?)\s*$")
STATISTIC = re.compile(r"(min|max|mean|median|percentile\((\d+(?:\.\d+)?)%\)) = (" + NUMBER + ")")
TOTAL = re.compile(r"^(Throughput|Total Host Walltime|Total GPU Compute Time): (" + NUMBER + r") (?:qps|s)$")
END = re.compile(
    r"^&&&& (?P<verdict>PASSED|FAILED) TensorRT\.trtexec \[TensorRT v(?P<version>\d+)\]", re.MULTILINE
)
NOT_JSON = re.compile(r"([:,\[]\s*)(-?)(inf|nan)\b")

Json = Dict[str, Any]


def find(path: Optional[str] = None) -> str:
    """The trtexec that was named, JetPack's, or the one on the path. Raises DeviceError where there is none."""
    usual = machine.system_path(USUAL_PATH)
    found = path or (usual if os.access(usual, os.X_OK) else shutil.which("trtexec"))
    if not found or not os.access(found, os.X_OK):
        raise DeviceError(
            "benchmark.trtexec: there is no {} on this target. On a Jetson it comes with libnvinfer-bin, and pip's "
            "tensorrt has none: install it, or set benchmark.trtexec to false.".format(path or "trtexec"),
            errors.MISMATCH,
        )
    return found


def known_flags(path: str) -> Set[str]:
    """The flags that its help names."""
    text = _output([path, "--help"], HELP_TIMEOUT_S)[1]
    return set(re.findall(r"--[A-Za-z]\w*", text))


def flags(known: Set[str], engine_path: str, settings: Json, load_options: Json) -> List[str]:
    """Flags for the same measurement as the scenario throughput with these settings, whatever the version."""
    chosen = [
        "--loadEngine=" + engine_path,
        "--warmUp={:d}".format(int(settings["warmup_ms"])),
        "--duration={:g}".format(max(1, round(settings["min_duration_s"]))),
    ]
    if settings["streams"] > 1:
        name = "--infStreams" if "--infStreams" in known else "--streams"
        chosen.append("{}={}".format(name, settings["streams"]))
    if settings["in_flight"] == 1:
        chosen.append("--exposeDMA")
    if load_options["dla_core"] is not None:
        chosen.append("--useDLACore={}".format(load_options["dla_core"]))
    if load_options["version_compatible"]:
        chosen.append("--versionCompatible")
    if load_options["zero_copy"]:
        chosen.append("--useManagedMemory")
    return chosen + _modes(known, settings, load_options)


def _modes(known: Set[str], settings: Json, load_options: Json) -> List[str]:
    """The three choices whose defaults TensorRT 11 turned round, with the flags that speak against them."""
    transfers = settings["transfers"] and not load_options["zero_copy"]
    choices = (
        (settings["cuda_graph"], "--useCudaGraph", "--noCudaGraph"),
        (not transfers, "--noDataTransfers", "--includeDataTransfers"),
        (settings["spin_wait"], "--useSpinWait", "--noSpinWait"),
    )
    turned_round = "--noCudaGraph" in known
    if turned_round:
        return [against for wanted, _, against in choices if not wanted]
    return [flag for wanted, flag, _ in choices if wanted]


def shapes_flag(shapes: Mapping[str, Sequence[int]]) -> str:
    """For an engine whose shapes are open."""
    described = ("{}:{}".format(name, "x".join(map(str, shape))) for name, shape in sorted(shapes.items()))
    return "--shapes=" + ",".join(described)


def measure(
    path: str, engine_path: str, settings: Json, load_options: Json, shapes: Mapping[str, Any]
) -> Json:
    """Runs it on an engine; ``shapes`` are of its open inputs, or empty. Times in ms, as in our own report.

    A failure is told in ``failed``: it is a cross-check, and no reason to lose what was measured.
    """
    times_path = outputs.scratch_path("trtexec-times.json")
    command = [path]
    try:
        command += flags(known_flags(path), engine_path, settings, load_options)
        command += ([shapes_flag(shapes)] if shapes else []) + ["--exportTimes=" + times_path]
        status, log = _output(command, settings["min_duration_s"] + EXTRA_TIMEOUT_S)
        report = dict(parse_log(log), command=command)
        if status != 0 or not report["passed"]:
            return dict(report, failed="exit status {}: {}".format(status, log.strip()[-1000:]))
        return with_times(report, read_times(times_path, settings["warmup_ms"]))
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        return {"passed": False, "failed": str(exc), "command": command}
    finally:
        outputs.remove(times_path)


def _output(command: List[str], timeout_s: float) -> Tuple[int, str]:
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output = child.communicate(timeout=timeout_s)[0]
    except BaseException:
        child.kill()
        child.communicate()
        raise
    return child.returncode, output.decode("utf-8", "replace")


def parse_log(text: str) -> Json:
    """What trtexec printed: version, verdict, the summary of the first run, and its warnings."""
    end = END.search(text)
    report = {
        "passed": bool(end and end.group("verdict") == "PASSED"),
        "version": version_text(int(end.group("version"))) if end else None,
        "warnings": [],
    }  # type: Json
    for line in text.splitlines():
        match = LINE.match(line)
        if match and match.group("level") == "I":
            _add_figures(report, match.group("text"))
        elif match and match.group("level") == "W" and match.group("text").startswith("* "):
            report["warnings"].append(match.group("text")[2:])
    return report


def _add_figures(report: Json, text: str) -> None:
    name = text.partition(": ")[0]
    found = STATISTIC.findall(text) if name in METRICS else []
    if found:
        values = {_statistic(label, percent): float(number) for label, percent, number in found}
        report.setdefault(METRICS[name], values)
    total = TOTAL.match(text)
    if total:
        keys = {"Throughput": "queries_per_s", "Total Host Walltime": "walltime_s"}
        report.setdefault(keys.get(total.group(1), "gpu_compute_total_s"), float(total.group(2)))


def _statistic(label: str, percent: str) -> str:
    return "p{:g}".format(float(percent)) if percent else label


def version_text(number: int) -> str:
    """8502 is 8.5.2; from 10 on the major version has two digits: 101303 is 10.13.3."""
    major, rest = divmod(number, 1000 if number < 10000 else 10000)
    return "{}.{}.{}".format(major, *divmod(rest, 100))


def with_times(report: Json, times: Json) -> Json:
    """Percentiles that an old trtexec does not print, from the times that it exported."""
    filled = {name: dict(times[name], **report.get(name, {})) for name in times}
    return dict(report, **filled)


def read_times(path: str, warmup_ms: float) -> Json:
    """Statistics of ``--exportTimes``. Up to 8.4 it holds the warm-up too; those have ``endToEndMs``.

    Its durations are good; its points in time have six digits, which is 10 us after a second.
    """
    rows = read_json(path)
    kept = [row for row in rows if "endToEndMs" not in row or row["startComputeMs"] >= warmup_ms] or rows
    return {ours: float32.summary([row[theirs] for row in kept]) for theirs, ours in TIMES.items()}


def read_profile(path: str) -> List[Tuple[str, float]]:
    """Layers and their ms a query from ``--exportProfile``: the median, where it tells one."""
    rows = [row for row in read_json(path) if "name" in row]
    return [(row["name"], float(row.get("medianMs", row["averageMs"]))) for row in rows]


def read_layers(layer_info_path: str, profile_path: str) -> List[Json]:
    """Our table of layers from ``--exportLayerInfo`` and ``--exportProfile``."""
    return layers.table(read_json(layer_info_path), [read_profile(profile_path)])


def read_outputs(path: str) -> Json:
    """Shape and values of each output from ``--exportOutput``."""
    return {
        entry["name"]: {
            "shape": [int(size) for size in entry["dimensions"].split("x") if size],
            "values": [float(value) for value in entry["values"]],
        }
        for entry in read_json(path)
    }


def read_json(path: str) -> Any:
    """trtexec prints inf and nan as C++ does, and control characters in names as they are."""
    with open(path) as file:
        text = file.read()
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return json.loads(NOT_JSON.sub(_as_json, text), strict=False)


def _as_json(match: Any) -> str:
    before, sign, word = match.groups()
    return str(before + ("NaN" if word == "nan" else sign + "Infinity"))


def differences(ours: Json, theirs: Json) -> Dict[str, Optional[float]]:
    """How far our figures are above trtexec's, as ratios: 0.01 is 1 % more; None where it has none, or 0."""
    pairs = {name: (ours[name]["median"], theirs.get(name, {}).get("median")) for name in COMPARED}
    pairs["queries_per_s"] = (ours["queries_per_s"], theirs.get("queries_per_s"))
    return {name: mine / other - 1.0 if other else None for name, (mine, other) in pairs.items()}
