"""Networks that build in a moment and together use what deployed ones are made of; for trying a target out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jetway.tasks.metrics import Metric
from jetway.tasks.onnx_graph import Array
from jetway.tasks.workload import Inputs, Outputs, Record, Sample, Workload

SEED = 20260101
SAMPLES = 8
# Wide enough for integers to pay on a CPU, where what does not pay stays in float.
CHANNELS = 64
INPUT, OUTPUT = "x", "y"
ERROR_RATIO = "error_ratio"


class ConvReluAdd(nn.Module):
    """A residual block: convolutions whose sum an engine may fuse into one kernel."""

    shape = (CHANNELS, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.second(x) + x)


class Depthwise(nn.Module):
    """A depthwise convolution between two of size one, as mobile networks have them."""

    shape = (CHANNELS, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(CHANNELS, 2 * CHANNELS, 1)
        self.depthwise = nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 3, padding=1, groups=2 * CHANNELS)
        self.project = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        projected: Tensor = self.project(x)
        return projected


class MatMul(nn.Module):
    """Two linear layers over a sequence, as transformers have them."""

    shape = (64, 4 * CHANNELS)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4 * CHANNELS, 4 * CHANNELS)
        self.second = nn.Linear(4 * CHANNELS, 4 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.second(torch.relu(self.first(x)))
        return product


TINY_NETWORKS: dict[str, type[ConvReluAdd | Depthwise | MatMul]] = {
    "conv-relu-add": ConvReluAdd,
    "depthwise": Depthwise,
    "matmul": MatMul,
}


class _Samples(Dataset[Sample]):
    def __init__(self, tensors: Tensor, targets: Sequence[Any]) -> None:
        self._tensors, self._targets = tensors, targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Sample:
        return {INPUT: self._tensors[index]}, self._targets[index]


class TinyWorkload(Workload):
    """A tiny network on noise. Its one metric is how far an engine's outputs are from the expected ones.

    ``error_ratio`` is the largest error as a share of the output's largest magnitude, over all samples. ``expected``
    are the outputs of the evaluation samples, without batch dimension; PyTorch's own by default.
    """

    output_names = (OUTPUT,)
    metrics = (Metric(name=ERROR_RATIO, higher_is_better=False, best=0.0),)

    def __init__(self, name: str, expected: Sequence[Array] | None = None) -> None:
        self.name = name
        self._kind = TINY_NETWORKS[name]
        self._expected = self._outputs_of_network() if expected is None else list(expected)

    def network(self) -> nn.Module:
        """Always the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self._kind().eval()

    def example_inputs(self) -> Inputs:
        return {INPUT: self._noise(1, seed=0)}

    def evaluation_data(self) -> Dataset[Sample]:
        return _Samples(self.samples(), self._expected)

    # Calibrated on the same, so that no error is a value beyond its range.
    calibration_data = train_data = evaluation_data

    def samples(self) -> Tensor:
        """The evaluation inputs, along the first dimension."""
        return self._noise(SAMPLES, seed=1)

    def loss(self, outputs: Outputs, target: Any) -> Tensor:
        return nn.functional.mse_loss(outputs[OUTPUT], target)

    def score_sample(self, outputs: Mapping[str, np.ndarray[Any, Any]], target: Any) -> Record:
        return {ERROR_RATIO: error_ratio(np.asarray(target), outputs[OUTPUT])}

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        return {ERROR_RATIO: max(record[ERROR_RATIO] for record in records)}

    def _noise(self, count: int, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + seed)
        return torch.randn(count, *self._kind.shape, generator=generator)

    def _outputs_of_network(self) -> list[Array]:
        with torch.no_grad():
            return list(self.network()(self.samples()).numpy())


def error_ratio(expected: Array, actual: Array) -> float:
    """Largest error as a share of the largest expected magnitude.

    Raises ValueError for an output of another shape, or with values that are not finite.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"its shape is {list(actual.shape)}, not {list(expected.shape)}")
    if not np.isfinite(actual).all():
        raise ValueError("it holds values that are not finite")
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def host_outputs(onnx_path: Path, workload: TinyWorkload) -> list[Array]:
    """What this host's ONNX Runtime answers to each evaluation sample, computed as the file says, unoptimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"])
    return [session.run([OUTPUT], {INPUT: sample[None].numpy()})[0][0] for sample in workload.samples()]
