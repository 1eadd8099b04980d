"""Verb ``evaluate``: runs an engine over samples and writes what it returned; the host scores it."""

import os
import time
from typing import Any, Callable, Dict, Iterator, Tuple

from jetway.tasks.on_device import errors, outputs, passport, sessions, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensors import Tensor

Tensors = Dict[str, Tensor]


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Runs ``engine`` (``path``, ``sha256``) over the files of ``inputs``, in order.

    Each input file holds every named input with the samples along the first dimension. For each, one file
    of outputs is written under ``work_dir``: ``NAME.START`` is the output NAME of the samples from START on,
    first dimension the samples. Batches are as large as suits the engine; the last one is filled up to the least
    that the engine takes by repeating its last sample, and what that gives is dropped.
    """
    session = sessions.opened(sessions.checked(request["engine"]))
    started = time.monotonic()
    files, samples = [], 0
    try:
        for index, path in enumerate(request["inputs"]):
            text = "{} samples done".format(samples)
            progress({"done": index, "total": len(request["inputs"]), "text": text})
            output_path = _output_path(request, index)
            samples += evaluate_file(session, tensors.read_tensors(path), output_path)
            files.append({"path": output_path, "sha256": passport.file_sha256(output_path)})
    finally:
        session.close()
    return {"outputs": files, "samples": samples, "seconds": time.monotonic() - started}


def _output_path(request: Dict[str, Any], index: int) -> str:
    folder = outputs.outputs_folder(request["work_dir"])
    return os.path.join(folder, "outputs-{}-{}-{}.safetensors".format(os.getpid(), time.time(), index))


def evaluate_file(session: Any, given: Tensors, output_path: str) -> int:
    """Writes the outputs of all samples; returns how many there are."""
    taken = {name: given[name] for name in session.inputs_of(given)}
    count = _sample_count(taken)
    with tensors.TensorWriter(output_path) as writer:
        for start, used, batch in batches(taken, count, *session.batch_limits()):
            results = session.run_checked(session.inputs_of(batch))
            for name, output in zip(session.output_names, results):
                size = next(iter(batch.values())).shape[0]
                writer.add("{}.{}".format(name, start), _rows(name, Tensor.of(output), used, size))
    return count


def _sample_count(given: Tensors) -> int:
    counts = {name: tensor.shape[0] if tensor.shape else None for name, tensor in given.items()}
    if len(set(counts.values())) != 1 or None in counts.values():
        raise DeviceError(
            "The inputs disagree on the number of samples: {}.".format(counts), errors.BAD_REQUEST
        )
    return int(next(iter(given.values())).shape[0])


def batches(given: Tensors, count: int, fewest: int, size: int) -> Iterator[Tuple[int, int, Tensors]]:
    """First sample, number of samples, and the inputs of each batch of ``size``, the last of at least ``fewest``."""
    for start in range(0, count, size):
        used = min(size, count - start)
        stop = start + max(used, fewest)
        yield start, used, {name: tensor.rows(start, stop) for name, tensor in given.items()}


def _rows(name: str, output: Tensor, used: int, size: int) -> Tensor:
    """The output's rows of real samples. An engine for one sample may return any first dimension."""
    if output.shape and output.shape[0] == size:
        return output.rows(0, used)
    if size == 1:
        return Tensor(output.dtype, (1,) + output.shape, output.data)
    raise DeviceError(
        "Output {!r} has shape {} for {} samples: its first dimension must be the batch. Export with a "
        "batch of one, or return the batch first.".format(name, list(output.shape), size),
        errors.BAD_REQUEST,
    )
