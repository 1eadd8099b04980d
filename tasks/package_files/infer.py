"""Runs the engine beside this file. Needs Python 3.6 or newer, numpy, and the onnxruntime of passport.json.

python3 infer.py                      outputs for sample_input.npz
python3 infer.py my_input.npz         for inputs of your own: one array a named input, batch dimension first
python3 infer.py --save my_output.npz
python3 infer.py --check              compares with expected_output.npz; exit status 1 when they differ
python3 infer.py --benchmark 200      median and 90th percentile of 200 timed runs
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from typing import Any, Dict, List, Optional

import numpy
import onnxruntime

HERE = os.path.dirname(os.path.abspath(__file__))
#: Largest error that --check accepts, as a share of the largest expected value of the same output.
TOLERANCE = 1e-3
WARMUP_RUNS = 10
REFUSED = 2


class Refused(Exception):
    """The engine may not, or cannot, run here."""


def path_of(name: str) -> str:
    return os.path.join(HERE, name)


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def read_passport() -> Dict[str, Any]:
    with open(path_of("passport.json")) as file:
        passport = json.load(file)  # type: Dict[str, Any]
    return passport


def check_passport(passport: Dict[str, Any]) -> None:
    """Raises Refused unless the engine is whole and was built by this onnxruntime for such a machine."""
    built_by = passport["platform"]
    if onnxruntime.__version__ != built_by["engine_version"]:
        raise Refused(
            "The engine was built by onnxruntime {0}, and this Python has {1}. Install that version (python3 -m "
            "pip install onnxruntime=={0}), or build an engine from model.onnx with yours.".format(
                built_by["engine_version"], onnxruntime.__version__
            )
        )
    if platform.machine() != built_by["architecture"]:
        raise Refused(
            "The engine was built for {}, and this machine is {}. Build one from model.onnx here.".format(
                built_by["architecture"], platform.machine()
            )
        )
    digest = file_sha256(path_of("model.engine"))
    if digest != passport["engine_sha256"]:
        raise Refused(
            "model.engine is corrupt: its sha256 is {}, and the passport says {}. Unpack the package "
            "again.".format(digest[:12], passport["engine_sha256"][:12])
        )


def load_engine(options: Dict[str, Any]) -> Any:
    """A session with the options that the engine was built and measured for."""
    native = onnxruntime.SessionOptions()
    native.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, options["graph_optimization_level"]
    )
    native.execution_mode = getattr(onnxruntime.ExecutionMode, options["execution_mode"])
    native.intra_op_num_threads = options["intra_op_num_threads"]
    native.inter_op_num_threads = options["inter_op_num_threads"]
    for key, value in options["config_entries"].items():
        native.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path_of("model.engine"), native, providers=options["providers"])


def read_arrays(path: str) -> Dict[str, Any]:
    try:
        with numpy.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as exc:
        raise Refused("{} cannot be read as an .npz file of named arrays: {}".format(path, exc))


def inputs_of(session: Any, arrays: Dict[str, Any]) -> Dict[str, Any]:
    """The arrays that the engine takes; an input that the network does not use is not in its graph."""
    names = [node.name for node in session.get_inputs()]
    missing = sorted(set(names) - set(arrays))
    if missing:
        raise Refused("The engine takes {}, and the file lacks {}.".format(sorted(names), missing))
    return {name: arrays[name] for name in names}


def infer(session: Any, inputs: Dict[str, Any]) -> Dict[str, Any]:
    """Outputs by name."""
    try:
        outputs = session.run(None, inputs)
    except Exception as exc:  # ONNX Runtime's exceptions have no base class of their own
        raise Refused("The engine does not take these inputs: {}".format(exc))
    return {node.name: array for node, array in zip(session.get_outputs(), outputs)}


def show(outputs: Dict[str, Any]) -> None:
    """Prints every output, and the label of each row of one that has as many columns as there are labels."""
    labels = read_labels()
    for name, array in outputs.items():
        print("{} {}{}:".format(name, array.dtype, list(array.shape)))
        print(numpy.array2string(array, threshold=100, precision=6))
        if labels and array.ndim == 2 and array.shape[1] == len(labels):
            for row in array:
                print("label: {}".format(labels[int(row.argmax())]))


def read_labels() -> List[str]:
    if not os.path.exists(path_of("labels.txt")):
        return []
    with open(path_of("labels.txt"), "rb") as file:
        return file.read().decode("utf-8").splitlines()


def save(outputs: Dict[str, Any], path: str) -> None:
    with open(path, "wb") as file:  # a file object, because a name would get another suffix
        numpy.savez(file, **outputs)
    print("saved: sha256 {} {}".format(file_sha256(path), path))


def check(outputs: Dict[str, Any], expected: Dict[str, Any]) -> bool:
    """Whether all outputs are the expected ones within TOLERANCE; says how far each is off."""
    if set(outputs) != set(expected):
        print("FAIL: the outputs are {}, expected {}".format(sorted(outputs), sorted(expected)))
        return False
    passed = [check_output(name, outputs[name], expected[name]) for name in expected]
    return all(passed)


def check_output(name: str, array: Any, expected: Any) -> bool:
    if array.shape != expected.shape or array.dtype != expected.dtype:
        print("FAIL: {} is {}{}, expected {}{}".format(
            name, array.dtype, list(array.shape), expected.dtype, list(expected.shape)
        ))  # fmt: skip
        return False
    error, limit = largest_error(array, expected)
    passed = bool(error <= limit)
    verdict = "PASS" if passed else "FAIL"
    print("{}: {}: largest error {:.3g}, at most {:.3g} allowed".format(verdict, name, error, limit))
    return passed


def largest_error(array: Any, expected: Any) -> Any:
    """The largest difference, and the limit for it. NaN and infinity must be where they are expected."""
    array, expected = array.astype(numpy.float64), expected.astype(numpy.float64)
    finite = numpy.isfinite(expected)
    same = (array == expected) | (numpy.isnan(array) & numpy.isnan(expected))
    if not numpy.array_equal(finite, numpy.isfinite(array)) or not same[~finite].all():
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    error = numpy.abs(array[finite] - expected[finite]).max()
    return float(error), float(TOLERANCE * numpy.abs(expected[finite]).max())


def benchmark(session: Any, inputs: Dict[str, Any], runs: int) -> None:
    """Times single runs, after some that are not counted."""
    times_ms = []
    for number in range(WARMUP_RUNS + runs):
        started = time.perf_counter()
        session.run(None, inputs)
        if number >= WARMUP_RUNS:
            times_ms.append((time.perf_counter() - started) * 1e3)
    p50, p90 = numpy.percentile(times_ms, [50, 90])
    print("latency of {} runs: p50 {:.4f} ms, p90 {:.4f} ms".format(runs, p50, p90))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("give a number of runs, 1 or more")
    return value


def parse(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs the engine of this folder.")
    parser.add_argument("input", nargs="?", default=path_of("sample_input.npz"), help=".npz of named inputs")
    parser.add_argument("--save", metavar="FILE", help="write the outputs as .npz")
    parser.add_argument("--check", action="store_true", help="compare with expected_output.npz")
    parser.add_argument("--benchmark", metavar="N", type=positive, help="time N runs")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    asked = parse(arguments)
    passport = read_passport()
    check_passport(passport)
    session = load_engine(passport["load_options"])
    inputs = inputs_of(session, read_arrays(asked.input))
    outputs = infer(session, inputs)
    if asked.save:
        save(outputs, asked.save)
    if asked.benchmark:
        benchmark(session, inputs, asked.benchmark)
    if asked.check:
        return 0 if check(outputs, read_arrays(path_of("expected_output.npz"))) else 1
    if not asked.save and not asked.benchmark:
        show(outputs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        sys.stderr.write("{}\n".format(refusal))
        sys.exit(REFUSED)
