"""Runs the engine beside this file. Needs Python 3.6 or newer, and what README.md names to run the engine with.

python3 infer.py                      outputs for sample_input.npz
python3 infer.py my_input.npz         for inputs of your own: one array a named input, batch dimension first
python3 infer.py --save my_output.npz
python3 infer.py --check              compares with expected_output.npz; exit status 1 when they differ
python3 infer.py --benchmark 200      median and 90th percentile of 200 timed runs
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
# Before any other of that name: this engine was tried with these files.
sys.path.insert(0, os.path.join(HERE, "runtime.zip"))

from jetway.tasks.on_device import engines, npz, passport, tensors  # noqa: E402
from jetway.tasks.on_device.errors import DeviceError  # noqa: E402
from jetway.tasks.on_device.tensors import Tensor  # noqa: E402

#: Largest error that --check accepts, as a share of the largest expected value of the same output.
TOLERANCE = 1e-3
WARMUP_RUNS = 10
SHOWN_VALUES = 20
REFUSED = 2

Tensors = Dict[str, Tensor]


def path_of(name: str, folder: str = HERE) -> str:
    return os.path.join(folder, name)


def read_passport(folder: str = HERE) -> Dict[str, Any]:
    with open(path_of("passport.json", folder)) as file:
        found = json.load(file)  # type: Dict[str, Any]
    return found


def check_passport(found: Dict[str, Any], folder: str = HERE) -> None:
    """Raises DeviceError unless the engine is whole and was built for such a machine."""
    engine_path = path_of("model.engine", folder)
    digest = passport.file_sha256(engine_path)
    if digest != found["engine_sha256"]:
        raise DeviceError(
            "model.engine is corrupt: its sha256 is {}, and the passport says {}. Unpack the package again.".format(
                digest[:12], found["engine_sha256"][:12]
            )
        )
    passport.check_platform(engine_path, found, "Build one from model.onnx for this machine.")


@contextmanager
def opened(found: Dict[str, Any], folder: str = HERE) -> Iterator[Any]:
    """The loaded engine, with the options that it was built and measured for."""
    engine = engines.engine_of(found["platform"]["engine"])
    session = engine.Session(path_of("model.engine", folder), found["load_options"])
    try:
        yield session
    finally:
        session.close()


def infer(session: Any, inputs: Any) -> Tensors:
    """Outputs by name."""
    return dict(zip(session.output_names, map(Tensor.of, session.run_checked(inputs))))


def show(outputs: Tensors) -> None:
    """Prints every output, and the label of each row of one that has as many columns as there are labels."""
    labels = read_labels()
    for name, tensor in outputs.items():
        print("{} {}:".format(name, describe(tensor)))
        values = tensor.values()
        more = ", ..." if len(values) > SHOWN_VALUES else ""
        print(", ".join("{:.6g}".format(value) for value in values[:SHOWN_VALUES]) + more)
        if labels and len(tensor.shape) == 2 and tensor.shape[1] == len(labels):
            for start in range(0, len(values), len(labels)):
                row = values[start : start + len(labels)]
                print("label: {}".format(labels[row.index(max(row))]))


def describe(tensor: Tensor) -> str:
    return "{}{}".format(tensors.NUMPY_NAMES.get(tensor.dtype, tensor.dtype), list(tensor.shape))


def read_labels(folder: str = HERE) -> List[str]:
    path = path_of("labels.txt", folder)
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return file.read().decode("utf-8").splitlines()


def save(outputs: Tensors, path: str) -> None:
    npz.write(path, outputs)
    print("saved: sha256 {} {}".format(passport.file_sha256(path), path))


def check(outputs: Tensors, expected: Tensors) -> bool:
    """Whether all outputs are the expected ones within TOLERANCE; says how far each is off."""
    if set(outputs) != set(expected):
        print("FAIL: the outputs are {}, expected {}".format(sorted(outputs), sorted(expected)))
        return False
    passed = [check_output(name, outputs[name], expected[name]) for name in expected]
    return all(passed)


def check_output(name: str, output: Tensor, expected: Tensor) -> bool:
    if (output.shape, output.dtype) != (expected.shape, expected.dtype):
        print("FAIL: {} is {}, expected {}".format(name, describe(output), describe(expected)))
        return False
    error, limit = largest_error(output.values(), expected.values())
    passed = error <= limit
    verdict = "PASS" if passed else "FAIL"
    print("{}: {}: largest error {:.3g}, at most {:.3g} allowed".format(verdict, name, error, limit))
    return passed


def largest_error(values: List[Any], expected: List[Any]) -> Tuple[float, float]:
    """The largest difference, and the limit for it. NaN and infinity must be where they are expected."""
    pairs = list(zip(values, expected))
    if any(
        value != wanted
        for value, wanted in pairs
        if not is_finite(value, wanted) and not is_nan(value, wanted)
    ):
        return math.inf, 0.0
    finite = [pair for pair in pairs if is_finite(*pair)]
    error = max((abs(value - wanted) for value, wanted in finite), default=0.0)
    return error, TOLERANCE * max((abs(wanted) for _, wanted in finite), default=0.0)


def is_finite(*values: Any) -> bool:
    return all(map(math.isfinite, values))


def is_nan(*values: Any) -> bool:
    return all(map(math.isnan, values))


def benchmark(session: Any, inputs: Any, runs: int) -> None:
    """Times single runs, after some that are not counted."""
    query, times_ms = session.query(inputs), []
    for number in range(WARMUP_RUNS + runs):
        started = time.perf_counter()
        query()
        if number >= WARMUP_RUNS:
            times_ms.append((time.perf_counter() - started) * 1e3)
    p50, p90 = (sorted(times_ms)[math.ceil(share * runs) - 1] for share in (0.5, 0.9))
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
    found = read_passport()
    check_passport(found)
    with opened(found) as session:
        inputs = session.inputs_of(npz.read(asked.input))
        outputs = infer(session, inputs)
        if asked.benchmark:
            benchmark(session, inputs, asked.benchmark)
    if asked.save:
        save(outputs, asked.save)
    if asked.check:
        return 0 if check(outputs, npz.read(path_of("expected_output.npz"))) else 1
    if not asked.save and not asked.benchmark:
        show(outputs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeviceError as refusal:
        sys.stderr.write("{}\n".format(refusal))
        sys.exit(REFUSED)
