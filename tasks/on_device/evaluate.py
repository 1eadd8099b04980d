"""Verb ``evaluate``: runs an engine over samples and writes what it returned; the host scores it."""

import os
import time
from typing import Any, Callable, Dict, Iterator, Tuple

from jetway.tasks.on_device import errors, outputs, passport, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnxruntime_engine import OnnxRuntimeSession

# Samples a call, where the engine leaves the batch open.
OPEN_BATCH = 32

Arrays = Dict[str, Any]


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Runs ``engine`` (``path``, ``sha256``) over the files of ``inputs``, in order.

    Each input file holds every named input with the samples along the first dimension. For each, one file
    of outputs is written under ``work_dir``: ``NAME.START`` is the output NAME of the samples from START on,
    first dimension the samples. Batches are as large as the engine's own; the last one is filled up by
    repeating its last sample, and what that gives is dropped.
    """
    engine = request["engine"]
    options = passport.check(engine["path"], engine["sha256"])["load_options"]
    session = OnnxRuntimeSession(engine["path"], options)
    started = time.monotonic()
    files, samples = [], 0
    for index, path in enumerate(request["inputs"]):
        progress({"done": index, "total": len(request["inputs"]), "text": "{} samples done".format(samples)})
        arrays = session.inputs_of(tensors.read_tensors(path))
        output_path = _output_path(request, index)
        samples += evaluate_file(session, arrays, output_path)
        files.append({"path": output_path, "sha256": passport.file_sha256(output_path)})
    return {"outputs": files, "samples": samples, "seconds": time.monotonic() - started}


def _output_path(request: Dict[str, Any], index: int) -> str:
    folder = outputs.outputs_folder(request["work_dir"])
    return os.path.join(folder, "outputs-{}-{}-{}.safetensors".format(os.getpid(), time.time(), index))


def evaluate_file(session: OnnxRuntimeSession, arrays: Arrays, output_path: str) -> int:
    """Writes the outputs of all samples in ``arrays``; returns how many there are."""
    count = _sample_count(arrays)
    batch = session.static_batch() or OPEN_BATCH
    with tensors.TensorWriter(output_path) as writer:
        for start, used, inputs in batches(arrays, count, batch, session.static_batch() is not None):
            for name, output in zip(session.output_names, session.run_checked(inputs)):
                writer.add("{}.{}".format(name, start), _rows(name, output, used, inputs))
    return count


def _sample_count(arrays: Arrays) -> int:
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise DeviceError(
            "The inputs disagree on the number of samples: {}.".format(counts), errors.BAD_REQUEST
        )
    return int(next(iter(counts.values())))


def batches(arrays: Arrays, count: int, batch: int, fill: bool) -> Iterator[Tuple[int, int, Arrays]]:
    """First sample, number of samples, and the inputs of each batch."""
    import numpy as np

    for start in range(0, count, batch):
        stop = min(start + batch, count)
        indices = list(range(start, stop))
        if fill:
            indices += [stop - 1] * (batch - len(indices))
        yield start, stop - start, {name: np.ascontiguousarray(a[indices]) for name, a in arrays.items()}


def _rows(name: str, output: Any, used: int, inputs: Arrays) -> Any:
    """The output's rows of real samples. An engine for one sample may return any first dimension."""
    batch = next(iter(inputs.values())).shape[0]
    if output.ndim and output.shape[0] == batch:
        return output[:used]
    if batch == 1:
        return output[None]
    raise DeviceError(
        "Output {!r} has shape {} for {} samples: its first dimension must be the batch. Export with a "
        "batch of one, or return the batch first.".format(name, list(output.shape), batch),
        errors.BAD_REQUEST,
    )
