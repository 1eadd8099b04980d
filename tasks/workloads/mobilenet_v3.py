"""Reference workload: MobileNetV3, classifying digits cut out of cluttered scenes.

A. Howard et al., "Searching for MobileNetV3", ICCV 2019: inverted residuals with depthwise convolutions, squeeze and
excitation, and hard-swish. The tables are the paper's; the width multiplier scales every one of their channels.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.digits import Split
from jetway.data.light import light_of
from jetway.data.scene_augmentation import Augmentation
from jetway.data.scenes import CLASSES, DigitCrops, SceneConfig, image_input
from jetway.tasks.frames import Classes, FrameProcessing
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs
from jetway.tasks.workloads.scenes import SceneWorkload

Variant = Literal["small", "large"]


class Row(NamedTuple):
    """One inverted residual: kernel size, channels inside and after, squeeze-excitation, hard-swish, stride."""

    kernel: int
    inside: int
    outputs: int
    excite: bool
    swish: bool
    stride: int


STEM_CHANNELS = 16
TABLES: dict[Variant, tuple[Row, ...]] = {
    "small": (
        Row(3, 16, 16, True, False, 2),
        Row(3, 72, 24, False, False, 2),
        Row(3, 88, 24, False, False, 1),
        Row(5, 96, 40, True, True, 2),
        Row(5, 240, 40, True, True, 1),
        Row(5, 240, 40, True, True, 1),
        Row(5, 120, 48, True, True, 1),
        Row(5, 144, 48, True, True, 1),
        Row(5, 288, 96, True, True, 2),
        Row(5, 576, 96, True, True, 1),
        Row(5, 576, 96, True, True, 1),
    ),
    "large": (
        Row(3, 16, 16, False, False, 1),
        Row(3, 64, 24, False, False, 2),
        Row(3, 72, 24, False, False, 1),
        Row(5, 72, 40, True, False, 2),
        Row(5, 120, 40, True, False, 1),
        Row(5, 120, 40, True, False, 1),
        Row(3, 240, 80, False, True, 2),
        Row(3, 200, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 480, 112, True, True, 1),
        Row(3, 672, 112, True, True, 1),
        Row(5, 672, 160, True, True, 2),
        Row(5, 960, 160, True, True, 1),
        Row(5, 960, 160, True, True, 1),
    ),
}
#: Channels of the last convolution and of the layer before the classifier.
LAST_CHANNELS: dict[Variant, tuple[int, int]] = {"small": (576, 1024), "large": (960, 1280)}
#: The squeeze leaves this share of the channels.
SQUEEZE_RATIO = 0.25


class CropClassifier(SceneWorkload):
    """Classifies the digit in the middle of a ``size``×``size`` crop; ``width`` multiplies every layer's channels.

    ``round_to`` is what channel counts are multiples of: 8 in the paper, 16 for CPUs with VNNI; the other
    options are those of SceneWorkload, of the scenes that the crops come from.
    """

    output_names = ("logits",)
    metrics = (
        Metric(
            name="top1", best=1.0, description="share of the evaluation crops whose largest logit is right"
        ),
    )
    labels = tuple("0123456789")
    #: More would cut the digit in the middle off.
    strongest = Augmentation(crop_ratio=0.2, light_ratio=0.3)

    def __init__(
        self,
        size: int = 64,
        variant: Variant = "small",
        width: float = 1.0,
        round_to: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(SceneConfig(seed=seed), **options)
        self.size, self.variant, self.width, self.round_to = size, variant, width, round_to

    def network(self) -> nn.Module:
        return MobileNetV3(self.variant, self.width, self.round_to)

    def example_inputs(self) -> Inputs:
        return {"image": torch.zeros(1, 3, self.size, self.size)}

    def data(self, split: Split, augmentation: Augmentation | None = None) -> DigitCrops:
        return DigitCrops(split, self.scene_config, self.counts[split], self.size, augmentation)

    def scene_of(self, inputs: Inputs, target: Any) -> str:
        return f"{light_of(inputs['image'])}, {super().scene_of(inputs, target)}"

    def frame_processing(self) -> FrameProcessing:
        return FrameProcessing(
            input=image_input(self.size),
            results=Classes(output="logits"),
        )

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs["logits"], target)


class MobileNetV3(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes]."""

    def __init__(
        self, variant: Variant, width: float = 1.0, round_to: int = 8, classes: int = CLASSES
    ) -> None:
        super().__init__()
        table = [_widened(row, width, round_to) for row in TABLES[variant]]
        stem = round_channels(STEM_CHANNELS * width, round_to)
        inputs = [stem, *(row.outputs for row in table)]
        last, hidden = LAST_CHANNELS[variant]
        last = round_channels(last * width, round_to)
        self.stem = ConvBlock(3, stem, stride=2, swish=True)
        self.blocks = nn.Sequential(
            *(InvertedResidual(channels, row, round_to) for channels, row in zip(inputs, table, strict=False))
        )
        self.last = ConvBlock(inputs[-1], last, kernel=1, swish=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(last, hidden),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Linear(hidden, classes),
        )

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.last(self.blocks(self.stem(image)))))
        return logits


class ConvBlock(nn.Sequential):
    """Convolution and BatchNorm, then hard-swish or ReLU, or nothing where ``swish`` is None."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        swish: bool | None,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        activation = [] if swish is None else [nn.Hardswish() if swish else nn.ReLU()]
        super().__init__(conv, nn.BatchNorm2d(outputs), *activation)


class SqueezeExcitation(nn.Module):
    """Scales every channel by what the mean of all channels says (Hu et al., 2018), with a hard sigmoid."""

    def __init__(self, channels: int, round_to: int) -> None:
        super().__init__()
        squeezed = round_channels(channels * SQUEEZE_RATIO, round_to)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W] to features of the same shape."""
        scaled: Tensor = features * self.scale(features)
        return scaled


class InvertedResidual(nn.Module):
    """Widens, filters each channel, and narrows again; adds the input where shapes allow."""

    def __init__(self, inputs: int, row: Row, round_to: int) -> None:
        super().__init__()
        self.adds = row.stride == 1 and inputs == row.outputs
        widen = [ConvBlock(inputs, row.inside, kernel=1, swish=row.swish)] if row.inside != inputs else []
        filter_ = ConvBlock(
            row.inside, row.inside, kernel=row.kernel, stride=row.stride, groups=row.inside, swish=row.swish
        )
        excite = [SqueezeExcitation(row.inside, round_to)] if row.excite else []
        narrow = ConvBlock(row.inside, row.outputs, kernel=1, swish=None)
        self.body = nn.Sequential(*widen, filter_, *excite, narrow)

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        filtered: Tensor = self.body(features)
        return features + filtered if self.adds else filtered


def round_channels(channels: float, round_to: int) -> int:
    """The nearest multiple of ``round_to``, not more than a tenth below ``channels``, as the authors round."""
    rounded = max(round_to, int(channels + round_to / 2) // round_to * round_to)
    return rounded if rounded >= 0.9 * channels else rounded + round_to


def _widened(row: Row, width: float, round_to: int) -> Row:
    return row._replace(
        inside=round_channels(row.inside * width, round_to),
        outputs=round_channels(row.outputs * width, round_to),
    )
