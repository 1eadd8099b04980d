"""Histograms of the magnitudes that a layer reads, by NVIDIA ModelOpt's calibrator with a limit on its bins.

ModelOpt 0.47 takes the width of all bins from the first batch: zeros there give none, and a tiny maximum gives
as many more bins as later values are larger. Importing this module imports ModelOpt, which takes seconds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from modelopt.torch.quantization.calib import HistogramCalibrator
from torch import Tensor, nn

MOST_BINS = 2**14

# Below it float32 loses digits, down to a width of 0.
_LEAST_WIDTH = torch.finfo(torch.float32).tiny


class BoundedHistogramCalibrator(HistogramCalibrator):  # type: ignore[misc]
    """ModelOpt's calibrator for batches of any scale, with a search by squared error of our own.

    Zeros before the first other value wait for its bins. Where more than ``MOST_BINS`` were needed, as many
    neighbours as a power of two become one bin, so that no count is divided.
    """

    _calib_hist: Any
    _calib_bin_edges: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._zeros = 0

    def collect(self, x: Tensor) -> None:
        """Counts the magnitudes in ``x``."""
        largest = _largest_magnitude(x)
        if self._calib_hist is None and largest < self._num_bins * _LEAST_WIDTH:
            self._zeros += x.numel()
            return
        if self._calib_hist is not None:
            self._make_room(largest)
        super().collect(x)
        self._calib_hist[0] += self._zeros
        self._zeros = 0

    def reset(self) -> None:
        """Forgets what was counted."""
        super().reset()
        self._zeros = 0

    def compute_amax(self, method: str, *, stride: int = 1, **options: Any) -> Tensor | None:
        """The range by ``entropy``, ``mse`` or ``percentile``: 0 of zeros alone, None when nothing was counted."""
        if self._calib_hist is None:
            return torch.zeros(()) if self._zeros else None
        if method == "mse":
            return _least_error_range(self._calib_hist, self._calib_bin_edges, self._num_bits, stride)
        amax: Tensor = super().compute_amax(method, stride=stride, **options)
        return amax

    def _make_room(self, largest: float) -> None:
        width, counts = float(self._calib_bin_edges[1]), self._calib_hist
        if largest <= MOST_BINS * width:
            return
        factor = 2 ** math.ceil(math.log2(largest / width / MOST_BINS))
        merged = _sums_of_neighbours(counts, min(factor, counts.numel()))
        edges = torch.arange(merged.numel() + 1, dtype=torch.float32, device=counts.device) * (width * factor)
        self._calib_hist, self._calib_bin_edges, self._num_bins = merged, edges, merged.numel()


def _largest_magnitude(x: Tensor) -> float:
    lowest, highest = x.aminmax()
    return max(-float(lowest), float(highest))


def _sums_of_neighbours(counts: Tensor, size: int) -> Tensor:
    return nn.functional.pad(counts, (0, -counts.numel() % size)).reshape(-1, size).sum(1)


def _least_error_range(counts: Tensor, edges: Tensor, num_bits: int, stride: int) -> Tensor:
    """The range of the least squared error; values above it are clipped.

    Searched here: ModelOpt 0.47 was seen to return the smallest candidate whatever the histogram.
    """
    counts, edges = counts.double().cpu(), edges.double().cpu()
    if edges.numel() != counts.numel() + 1:
        # ModelOpt rounds twice as it adds bins; its counts are of even bins up to the last edge.
        edges = torch.linspace(0, float(edges[-1]), counts.numel() + 1, dtype=torch.float64)
    values, most = (edges[:-1] + edges[1:]) / 2, 2 ** (num_bits - 1) - 1
    candidates = edges[1:].flip(0)[::stride]
    steps = (candidates / most).clamp_min(_LEAST_WIDTH)
    errors = [((values / step).round().clamp(max=most) * step - values).square() @ counts for step in steps]
    return candidates[torch.stack(errors).argmin()].float()
