"""Reference workload: a one-stage, anchor-free detector that finds digits in cluttered scenes.

In the style of YOLO and NanoDet: a CSP backbone, a PAN neck and a head at each of its levels. Cells near the
middle of an object predict its class and their distances to the four sides of its box. Activations are ReLU
throughout, which integer kernels do for nothing. Boxes are decoded and suppressed outside the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.digits import Split
from jetway.data.light import light_of
from jetway.data.scene_augmentation import Augmentation
from jetway.data.scenes import CLASSES, DetectionScenes, SceneConfig, image_input
from jetway.tasks.average_precision import match_detections, mean_average_precision
from jetway.tasks.frames import Boxes, FrameInput, FrameProcessing
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs, Record, Workload
from jetway.tasks.workloads.scenes import SceneWorkload

Array = NDArray[Any]

#: Detections below this score are dropped, and those that overlap a better one of their class by more than this.
MIN_SCORE, MAX_IOU = 0.05, 0.6
#: Share of cells with an object at the start, which the bias of the classes states.
_PRIOR = 0.01
#: Cells whose centres are this many strides from the middle of an object learn to predict it.
_CENTRE_RADIUS = 1.5
#: Nearer cells learn it even outside its box, which may lie between the centres of cells.
_THIN_RADIUS = 0.75
#: Objects up to this many strides belong to a level, if it is not the last.
_LARGEST = 3.5
_ABSENT_WEIGHT, _BOX_WEIGHT = 0.75, 2.0


class FindsBoxes(Workload):
    """What detectors have in common whose ``cells`` give class logits and distances."""

    output_names: tuple[str, ...] = ("class_logits", "distances")
    metrics = (
        Metric(name="map50_95", best=1.0, description="COCO mean average precision over IoU 0.50 to 0.95"),
        Metric(name="map50", best=1.0, description="COCO mean average precision at IoU 0.50"),
    )
    cells: Cells

    def frame_input(self) -> FrameInput:
        raise NotImplementedError

    def frame_processing(self) -> FrameProcessing:
        return FrameProcessing(
            input=self.frame_input(),
            results=Boxes(
                class_logits="class_logits",
                distances="distances",
                strides=self.cells.strides,
                min_score=MIN_SCORE,
                max_iou=MAX_IOU,
            ),
        )

    def loss(self, outputs: Outputs, target: dict[str, Tensor]) -> Tensor:
        return detection_loss(outputs["class_logits"], outputs["distances"], target, self.cells)

    def score_sample(self, outputs: Mapping[str, Array], target: Any) -> Record:
        """The image's detections, matched to its true boxes."""
        found = decode_detections(outputs["class_logits"], outputs["distances"], self.cells)
        return self.score_boxes(*found, target)

    def score_boxes(self, boxes: Array, scores: Array, labels: Array, target: Any) -> Record:
        """The same of boxes [n, 4] in pixels of the input, whoever has named them."""
        true_labels = np.asarray(target["labels"])
        true_boxes, there = np.asarray(target["boxes"]), true_labels >= 0
        return match_detections(
            boxes, scores, labels, true_boxes[there], true_labels[there], classes=len(self.labels)
        )

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        return mean_average_precision(records, classes=len(self.labels))


class SceneDetector(FindsBoxes, SceneWorkload):
    """Finds digits in ``size``×``size`` scenes; ``widths`` are the channels at strides 4, 8, 16 and so on.

    Every stride from 8 on is a level that predicts. ``depth`` is the number of bottlenecks a stage, ``neck`` the
    channels of the neck's levels; the other options are those of SceneWorkload.
    """

    labels = tuple("0123456789")

    def __init__(
        self,
        size: int = 96,
        widths: Sequence[int] = (64, 128, 256),
        depth: int = 1,
        neck: int = 128,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(SceneConfig(size=size, seed=seed), **options)
        self.size, self.widths, self.depth, self.neck = size, tuple(widths), depth, neck
        self.cells = Cells(size, strides=[8 * 2**level for level in range(len(self.widths) - 1)])

    def network(self) -> nn.Module:
        return Detector(self.widths, self.depth, self.neck)

    def example_inputs(self) -> Inputs:
        return {"image": torch.zeros(1, 3, self.size, self.size)}

    def data(self, split: Split, augmentation: Augmentation | None = None) -> DetectionScenes:
        return DetectionScenes(split, self.scene_config, self.counts[split], augmentation)

    def scene_of(self, inputs: Inputs, target: Any) -> str:
        return f"{light_of(inputs['image'])}, {int((target['labels'] >= 0).sum())} digits"

    def frame_input(self) -> FrameInput:
        return image_input(self.size)


class Cells:
    """The places that predict: ``centres`` [cells, 2] as x, y in pixels, and the ``stride`` [cells] of each."""

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        self.strides = tuple(strides)
        centres = [_cell_centres(size // stride, stride) for stride in strides]
        self.centres = torch.cat(centres)
        self.stride = torch.cat(
            [torch.full((len(level),), float(stride)) for level, stride in zip(centres, strides, strict=True)]
        )
        self.is_last = self.stride == max(strides)
        self.is_first = self.stride == min(strides)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.centres.to(device), self.stride.to(device)


class Detector(nn.Module):
    """Backbone, neck and heads; gives class logits [N, classes, cells] and distances [N, 4, cells] in strides."""

    def __init__(self, widths: Sequence[int], depth: int, neck: int) -> None:
        super().__init__()
        self.stem = ConvBlock(3, widths[0], kernel=4, stride=4)
        self.stages = nn.ModuleList(
            [Csp(widths[0], widths[0], depth)]
            + [
                nn.Sequential(ConvBlock(narrow, wide, stride=2), Csp(wide, wide, depth))
                for narrow, wide in pairwise(widths)
            ]
        )
        self.neck = Pan(widths[1:], neck, depth)
        self.heads = nn.ModuleList([Head(neck) for _ in widths[1:]])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [N, 3, H, W], standardised; H and W are multiples of the largest stride."""
        features = [self.stages[0](self.stem(image))]
        for stage in self.stages[1:]:
            features.append(stage(features[-1]))
        levels = self.neck(features[1:])
        classes, distances = zip(
            *(head(level) for head, level in zip(self.heads, levels, strict=True)), strict=True
        )
        return torch.cat(classes, dim=2), torch.cat(distances, dim=2)


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        padding = 0 if kernel == stride else kernel // 2
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Bottleneck(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBlock(channels, channels, kernel=1), ConvBlock(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W] to features of the same shape."""
        summed: Tensor = features + self.body(features)
        return summed


class Csp(nn.Module):
    """Cross-stage partial block: half of the channels pass ``depth`` bottlenecks (Wang et al., "CSPNet", 2020)."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        half = outputs // 2
        self.deep = nn.Sequential(
            ConvBlock(inputs, half, kernel=1), *(Bottleneck(half) for _ in range(depth))
        )
        self.short = ConvBlock(inputs, half, kernel=1)
        self.join = ConvBlock(2 * half, outputs, kernel=1)

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, inputs, H, W] to [N, outputs, H, W]."""
        joined: Tensor = self.join(torch.cat([self.deep(features), self.short(features)], dim=1))
        return joined


class Pan(nn.Module):
    """Path aggregation: coarse features flow to fine levels, then fine ones back (Liu et al., "PANet", 2018)."""

    def __init__(self, inputs: Sequence[int], channels: int, depth: int) -> None:
        super().__init__()
        steps = range(len(inputs) - 1)
        self.lateral = nn.ModuleList([ConvBlock(width, channels, kernel=1) for width in inputs])
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.finer = nn.ModuleList([Csp(2 * channels, channels, depth) for _ in steps])
        self.down = nn.ModuleList([ConvBlock(channels, channels, stride=2) for _ in steps])
        self.coarser = nn.ModuleList([Csp(2 * channels, channels, depth) for _ in steps])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One tensor a level, finest first, to as many with ``channels`` each."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in reversed(range(len(self.finer))):
            levels[level] = self.finer[level](torch.cat([self.up(levels[level + 1]), levels[level]], dim=1))
        for level, (down, coarser) in enumerate(zip(self.down, self.coarser, strict=True)):
            levels[level + 1] = coarser(torch.cat([down(levels[level]), levels[level + 1]], dim=1))
        return levels


class Head(nn.Module):
    """Classes and distances of one level's cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = ConvBlock(channels, channels)
        self.classes = nn.Conv2d(channels, CLASSES, 1)
        self.distances = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.classes.bias, float(np.log(_PRIOR / (1 - _PRIOR))))  # type: ignore[arg-type]
        nn.init.ones_(self.distances.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C, H, W] to logits [N, classes, H·W] and distances [N, 4, H·W]."""
        features = self.body(features)
        return self.classes(features).flatten(2), self.distances(features).flatten(2)


def detection_loss(logits: Tensor, distances: Tensor, target: dict[str, Tensor], cells: Cells) -> Tensor:
    """Varifocal loss of the classes, and generalized IoU loss of the boxes, for each cell with an object.

    Zhang et al., "VarifocalNet", 2021: the score to learn is the IoU of the predicted box, and a cell without an
    object counts the less the surer the network is of it.
    Rezatofighi et al., "Generalized Intersection over Union", 2019.
    """
    owner = assign_cells(target["boxes"], target["labels"], cells)
    image, cell = torch.nonzero(owner >= 0, as_tuple=True)
    chosen = owner[image, cell]
    labels = target["labels"][image, chosen]
    predicted = decode_boxes(distances, cells)[image, cell]
    iou, generalized = box_overlaps(predicted, target["boxes"][image, chosen])
    wanted, weight = torch.zeros_like(logits), _ABSENT_WEIGHT * logits.detach().sigmoid().square()
    wanted[image, labels, cell], weight[image, labels, cell] = iou.detach(), 1.0
    classes = functional.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
    return (classes + _BOX_WEIGHT * (1 - generalized).sum()) / max(1, len(cell))


def assign_cells(boxes: Tensor, labels: Tensor, cells: Cells) -> Tensor:
    """For each cell the index of the object [N, cells] that it learns to predict, or -1.

    An object belongs to the levels whose stride suits its size, and there to the cells inside its box that are
    near its middle (Tian et al., "FCOS", 2019). Of several objects a cell takes the one whose middle is nearest.
    """
    centres, stride = cells.to(boxes.device)
    middle, extent = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).amax(-1)
    in_strides = extent[:, None] / stride[:, None]
    fits = (in_strides <= _LARGEST) | cells.is_last.to(boxes.device)[:, None]
    fits &= (in_strides > _LARGEST / 2) | cells.is_first.to(boxes.device)[:, None]
    away = (centres[:, None] - middle[:, None]).abs().amax(-1) / stride[:, None]
    inside = ((centres[:, None] > boxes[:, None, :, :2]) & (centres[:, None] < boxes[:, None, :, 2:])).all(-1)
    near = (away < _THIN_RADIUS) | (inside & (away < _CENTRE_RADIUS))
    allowed = fits & near & (labels >= 0)[:, None]
    nearest = away.masked_fill(~allowed, torch.inf).min(dim=2)
    return torch.where(nearest.values.isfinite(), nearest.indices, -1)


def decode_boxes(distances: Tensor, cells: Cells) -> Tensor:
    """Boxes [N, cells, 4] in pixels from distances [N, 4, cells] to left, top, right, bottom in strides."""
    centres, stride = cells.to(distances.device)
    pixels = distances.transpose(1, 2) * stride[:, None]
    return torch.cat([centres - pixels[..., :2], centres + pixels[..., 2:]], dim=-1)


def box_overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes [n, 4] with as many others."""
    sides = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(0)
    hull = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    shared, around = sides.prod(-1), hull.clamp(1e-6).prod(-1)
    union = (_area(boxes) + _area(others) - shared).clamp(1e-6)
    iou = shared / union
    return iou, iou - (around - union) / around


def decode_detections(logits: Array, distances: Array, cells: Cells) -> tuple[Array, Array, Array]:
    """Boxes [n, 4] in pixels, scores [n] and labels [n] of one image's outputs, best first."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    labels, places = np.nonzero(scores > MIN_SCORE)
    boxes = decode_boxes(torch.from_numpy(np.array(distances, dtype=np.float32))[None], cells)[0].numpy()[
        places
    ]
    kept = suppress(boxes, scores[labels, places], labels)
    return boxes[kept], scores[labels, places][kept], labels[kept]


def suppress(boxes: Array, scores: Array, labels: Array) -> list[int]:
    """Indices of the detections that no better one of their class overlaps by more than ``MAX_IOU``."""
    waiting = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(waiting):
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        doubled = (labels[waiting] == labels[best]) & (_iou(boxes[best], boxes[waiting]) > MAX_IOU)
        waiting = waiting[~doubled]
    return kept


def _cell_centres(count: int, stride: int) -> Tensor:
    places = (torch.arange(count) + 0.5) * stride
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(0).prod(-1)


def _iou(box: Array, others: Array) -> Array:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    return np.asarray(shared / np.maximum(union, 1e-6))
