"""Calibration data: the named sets of a workload, in batches for whatever takes ranges from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import cycle, islice

from torch.utils.data import Dataset

from jetway.configs.schema import DEFAULT_CALIBRATION_SET
from jetway.tasks.errors import ConfigError, QuantizationError
from jetway.tasks.workload import Inputs, Sample, Workload


def calibration_set(workload: Workload, name: str = DEFAULT_CALIBRATION_SET) -> Dataset[Sample]:
    """A calibration set by name. Raises ConfigError when there is none of it, QuantizationError when it is empty."""
    sets = workload.calibration_sets()
    if name not in sets:
        raise ConfigError(
            f"qat.calibration_set: {type(workload).__qualname__}.calibration_sets() has no {name!r}. "
            f"It has {', '.join(sets) or 'none'}."
        )
    if len(sets[name]) == 0:  # type: ignore[arg-type]
        source = "calibration_data()" if name == DEFAULT_CALIBRATION_SET else f"calibration_sets()[{name!r}]"
        raise QuantizationError(
            f"{type(workload).__qualname__}.{source} is empty, and int8 takes its ranges from it. "
            "Return some hundred typical samples that are not evaluation data."
        )
    return sets[name]


def calibration_batches(
    workload: Workload, samples: int, name: str = DEFAULT_CALIBRATION_SET
) -> Iterator[Inputs]:
    """Batches of calibration inputs of the example inputs' size, ``samples`` in all at most, the last one filled
    up from the start.

    Raises as ``calibration_set``.
    """
    data = calibration_set(workload, name)
    count = min(samples, len(data))  # type: ignore[arg-type]
    size = len(next(iter(workload.example_inputs().values())))
    padded = list(islice(cycle(range(count)), -(-count // size) * size))
    for start in range(0, len(padded), size):
        inputs, _ = workload.collate([data[index] for index in padded[start : start + size]])
        yield inputs


def sample_sha256(inputs: Inputs) -> str:
    """Digest of a sample's inputs: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
