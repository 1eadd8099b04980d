"""Reference workload: real handwritten digits, and a residual CNN with dense and depthwise convolutions."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.digits import DEVIATION, MEAN, Augmentation, Digits
from jetway.tasks.frames import Classes, FrameInput, FrameProcessing
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs, Workload

TRAINING_AUGMENTATION = Augmentation(rotation_degrees=12, shift_ratio=0.06, zoom_ratio=0.1)
# QAT adjusts weights, it learns no new invariance: a weaker augmentation keeps the ranges those of real images.
QAT_AUGMENTATION = Augmentation(rotation_degrees=5, shift_ratio=0.03, zoom_ratio=0.05)


class DigitsClassifier(Workload):
    """Classifies digits of ``size``×``size`` pixels; ``widths`` are the channels of stem, middle and deep stage."""

    output_names = ("logits",)
    metrics = (
        Metric(
            name="top1", best=1.0, description="share of the evaluation images whose largest logit is right"
        ),
    )
    labels = tuple("0123456789")

    def __init__(self, size: int = 32, widths: tuple[int, int, int] = (48, 96, 192), blocks: int = 2) -> None:
        self.size = size
        self.widths = widths
        self.blocks = blocks

    def network(self) -> nn.Module:
        stem, middle, deep = self.widths
        return nn.Sequential(
            OrderedDict(
                stem=ConvBlock(1, stem, stride=2),
                middle=nn.Sequential(separable_downsample(stem, middle), Residual(middle)),
                deep=nn.Sequential(
                    separable_downsample(middle, deep), *(Residual(deep) for _ in range(self.blocks))
                ),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Linear(deep, 10),
            )
        )

    def example_inputs(self) -> Inputs:
        return {"image": torch.zeros(1, 1, self.size, self.size)}

    def train_data(self) -> Digits:
        return Digits("train", self.size, TRAINING_AUGMENTATION)

    def qat_data(self) -> Digits:
        return Digits("train", self.size, QAT_AUGMENTATION)

    def calibration_data(self) -> Digits:
        return Digits("calibration", self.size)

    def evaluation_data(self) -> Digits:
        return Digits("evaluation", self.size)

    def frame_processing(self) -> FrameProcessing:
        return FrameProcessing(
            input=FrameInput(
                name="image",
                size=(self.size, self.size),
                colour="gray",
                mean=(255 * MEAN,),
                deviation=(255 * DEVIATION,),
            ),
            results=Classes(output="logits"),
        )

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs["logits"], target)


class ConvBlock(nn.Sequential):
    """Convolution and BatchNorm, and a ReLU unless an addition follows."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        conv = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    """Two dense convolutions around which the input passes (He et al., "Deep Residual Learning", 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = ConvBlock(channels, channels, relu=False)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W] to features of the same shape."""
        summed: Tensor = self.relu(features + self.second(self.first(features)))
        return summed


def separable_downsample(inputs: int, outputs: int) -> nn.Sequential:
    """Halves the resolution: depthwise, then pointwise (Howard et al., "MobileNets", 2017)."""
    return nn.Sequential(
        ConvBlock(inputs, inputs, stride=2, groups=inputs), ConvBlock(inputs, outputs, kernel=1)
    )
