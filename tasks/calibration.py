"""Calibration data in batches of the example inputs' size, for whatever takes ranges from them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from jetway.tasks.errors import QuantizationError
from jetway.tasks.workload import Inputs, Workload


def calibration_batches(workload: Workload, samples: int) -> Iterator[Inputs]:
    """Batches of calibration inputs, ``samples`` in all at most, the last one filled up from the start.

    Raises QuantizationError when there are no calibration data.
    """
    data = workload.calibration_data()
    count = min(samples, len(data))  # type: ignore[arg-type]
    if count == 0:
        raise QuantizationError(
            f"{type(workload).__qualname__}.calibration_data() is empty, and int8 takes its ranges from it. "
            "Return some hundred typical samples that are not evaluation data."
        )
    size = len(next(iter(workload.example_inputs().values())))
    padded = list(islice(cycle(range(count)), -(-count // size) * size))
    for start in range(0, len(padded), size):
        inputs, _ = workload.collate([data[index] for index in padded[start : start + size]])
        yield inputs
