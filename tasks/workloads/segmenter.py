"""Reference workload: a segmenter that says of every pixel of a cluttered scene whether it is on a digit, and which.

In the style of PoolFormer (Yu et al., "MetaFormer Is Actually What You Need for Vision", 2022) and FastSegFormer:
an encoder whose blocks mix neighbouring places by pooling instead of attention, and a pyramid decoder. Norms are
BatchNorm inside convolutions and activations ReLU, which integer kernels do for nothing. The engine gives logits at
a quarter of the resolution, as SegFormer does; they are scaled up outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.digits import Split
from jetway.data.light import light_of
from jetway.data.scene_augmentation import Augmentation
from jetway.data.scenes import CLASSES, SceneConfig, SegmentationScenes, image_input
from jetway.tasks.frames import FrameProcessing, Masks
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs, Record
from jetway.tasks.workloads.scenes import SceneWorkload

Array = NDArray[Any]

#: Background and the digits.
MASK_CLASSES = 1 + CLASSES
#: Background is most of a scene, and counts this much in the loss.
_BACKGROUND_WEIGHT = 0.3


class SceneSegmenter(SceneWorkload):
    """Segments ``size``×``size`` scenes; ``widths`` are the channels at strides 4, 8, 16 and so on, ``depths`` the
    blocks there, ``decoder`` the channels of the pyramid; the other options are those of SceneWorkload.
    """

    output_names = ("logits",)
    metrics = (
        Metric(name="miou", best=1.0, description="mean intersection over union of background and digits"),
        Metric(name="pixel_accuracy", best=1.0, description="share of the pixels whose class is right"),
    )
    labels = ("background", *"0123456789")

    def __init__(
        self,
        size: int = 96,
        widths: Sequence[int] = (48, 96, 192),
        depths: Sequence[int] = (1, 2, 2),
        decoder: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(SceneConfig(size=size, seed=seed), **options)
        self.size, self.widths, self.depths, self.decoder = size, tuple(widths), tuple(depths), decoder

    def network(self) -> nn.Module:
        return Segmenter(self.widths, self.depths, self.decoder)

    def example_inputs(self) -> Inputs:
        return {"image": torch.zeros(1, 3, self.size, self.size)}

    def data(self, split: Split, augmentation: Augmentation | None = None) -> SegmentationScenes:
        return SegmentationScenes(split, self.scene_config, self.counts[split], augmentation)

    def scene_of(self, inputs: Inputs, target: Any) -> str:
        """Equal digits of a scene are one class of its mask."""
        digits = torch.unique(target[target > 0])
        return f"{light_of(inputs['image'])}, {len(digits)} different digits"

    def frame_processing(self) -> FrameProcessing:
        return FrameProcessing(
            input=image_input(self.size),
            results=Masks(output="logits"),
        )

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        logits = upsample(outputs["logits"], self.size)
        weight = torch.ones(MASK_CLASSES, device=logits.device)
        weight[0] = _BACKGROUND_WEIGHT
        return functional.cross_entropy(logits, target, weight)

    def score_sample(self, outputs: Mapping[str, Array], target: Any) -> Record:
        """Pixels of each class in prediction and truth together (``intersection``) and in either (``union``).

        ``pixel_ratios`` are the shares of the image that the prediction gives each class.
        """
        logits = torch.from_numpy(np.array(outputs["logits"], dtype=np.float32))[None]
        predicted = upsample(logits, self.size)[0].argmax(dim=0)
        return score_masks(predicted.numpy(), np.asarray(target))

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """Pixels are summed over all images first, so that an image counts for a class by its share of it."""
        intersection = np.array([record["intersection"] for record in records]).sum(axis=0)
        union = np.array([record["union"] for record in records]).sum(axis=0)
        seen = union > 0
        return {
            "miou": float((intersection[seen] / union[seen]).mean()),
            "pixel_accuracy": float(intersection.sum() / (len(records) * self.size**2)),
        }


class Segmenter(nn.Module):
    """Image [N, 3, H, W] to logits [N, classes, H/4, W/4]; H and W are multiples of the largest stride."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], decoder: int) -> None:
        super().__init__()
        inputs = (3, *widths)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_embed(narrow, wide), *(PoolBlock(wide) for _ in range(depth)))
                for narrow, wide, depth in zip(inputs, widths, depths, strict=False)
            ]
        )
        self.decoder = PyramidDecoder(widths, decoder)
        self.classifier = nn.Conv2d(decoder, MASK_CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = [image]
        for stage in self.stages:
            features.append(stage(features[-1]))
        logits: Tensor = self.classifier(self.decoder(features[1:]))
        return logits


class ConvBlock(nn.Sequential):
    """Convolution and BatchNorm, and a ReLU unless an addition follows."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, relu: bool = True
    ) -> None:
        padding = 0 if kernel == stride else kernel // 2
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class PoolBlock(nn.Module):
    """Two pointwise convolutions over each place and the mean of its neighbourhood, around which the input passes."""

    #: Channels inside, as a multiple of those outside.
    EXPANSION = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.mlp = nn.Sequential(
            ConvBlock(2 * channels, self.EXPANSION * channels),
            ConvBlock(self.EXPANSION * channels, channels, relu=False),
        )
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W] to features of the same shape."""
        mixed = torch.cat([features, self.pool(features)], dim=1)
        summed: Tensor = self.relu(features + self.mlp(mixed))
        return summed


class PyramidDecoder(nn.Module):
    """Adds coarse features to finer ones, level by level (Lin et al., "Feature Pyramid Networks", 2017)."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([ConvBlock(width, channels) for width in inputs])
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.smooth = ConvBlock(channels, channels, kernel=3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One tensor a level, finest first, to [N, channels, H, W] of the finest."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        summed = levels.pop()
        while levels:
            summed = self.up(summed) + levels.pop()
        smoothed: Tensor = self.smooth(summed)
        return smoothed


def upsample(logits: Tensor, size: int) -> Tensor:
    return functional.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def score_masks(predicted: Array, true: Array) -> Record:
    """What one image adds, as JSON: a list with a value for each class."""
    pairs = np.bincount((true * MASK_CLASSES + predicted).ravel(), minlength=MASK_CLASSES**2)
    confusion = pairs.reshape(MASK_CLASSES, MASK_CLASSES)
    intersection, found = np.diagonal(confusion), confusion.sum(axis=0)
    return {
        "intersection": intersection.tolist(),
        "union": (found + confusion.sum(axis=1) - intersection).tolist(),
        "pixel_ratios": (found / predicted.size).tolist(),
    }


def _embed(inputs: int, outputs: int) -> ConvBlock:
    """Patches of 4×4 pixels for the image, overlapping 3×3 windows after that."""
    if inputs == 3:
        return ConvBlock(inputs, outputs, kernel=4, stride=4)
    return ConvBlock(inputs, outputs, kernel=3, stride=2)
