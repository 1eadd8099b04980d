"""How good a network is on calibration samples, by the workload's primary metric and by its loss.

The samples are never those of the final score. The loss tells apart what a metric on few samples cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from jetway.tasks.errors import WorkloadError
from jetway.tasks.stage import StageContext
from jetway.tasks.training import to_device, users_code
from jetway.tasks.workload import call_network, evaluate_network

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Score:
    metric: float
    loss: float


class Scorer:
    """Scores networks on the same calibration samples, ``samples`` at most."""

    def __init__(self, context: StageContext, samples: int) -> None:
        self.context, self.workload = context, context.workload
        with users_code(self.workload, "its calibration data"):
            data = self.workload.calibration_data()
            self.samples = [data[i] for i in range(min(samples, len(data)))]  # type: ignore[arg-type]
        if not self.samples:
            raise WorkloadError(
                f"{type(self.workload).__qualname__}.calibration_data() is empty, and sensitivity is measured on it. "
                "Return some hundred typical samples with targets that are not evaluation data."
            )

    def __call__(self, network: nn.Module) -> Score:
        """Raises WorkloadError when the calibration samples' targets cannot be scored."""
        network.to(self.context.device).eval()
        with users_code(
            self.workload, "scoring its calibration data, which needs targets as its evaluation data has,"
        ):
            records = evaluate_network(self.workload, network, data=self.samples, device=self.context.device)
            metric = self.workload.summarize(records)[self.workload.primary_metric.name]
            loss = self._loss(network)
        network.to("cpu")
        return Score(float(metric), loss if math.isfinite(loss) else math.inf)

    def drop(self, before: Score, after: Score) -> float:
        """How much worse the primary metric became; negative where it became better."""
        lost = before.metric - after.metric
        return lost if self.workload.primary_metric.higher_is_better else -lost

    def _loss(self, network: nn.Module) -> float:
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self.samples), _BATCH_SIZE):
                batch = self.samples[start : start + _BATCH_SIZE]
                inputs, target = to_device(self.workload.collate(batch), self.context.device)
                outputs = call_network(network, inputs, self.workload.output_names)
                total += len(batch) * float(self.workload.loss(outputs, target))
        return total / len(self.samples)
