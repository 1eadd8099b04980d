"""Detectors by import path, such as ultralytics', on images in folders with a text file of boxes beside each.

class_path: jetway.tasks.workloads.imported_detector:ImageDetector
options:
  factory: jetway.tasks.workloads.yolo:detector
  arguments: {cfg: yolo11n.yaml, nc: 2}
  labels: [cat, dog]
  data: pets                     # train/, calibration/ and evaluation/, each with images/ and labels/
  size: 640
checkpoint: weights.pt
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jetway.data.image_folder import BoxedImages
from jetway.tasks.frames import FrameInput
from jetway.tasks.workloads.detector import Cells, FindsBoxes
from jetway.tasks.workloads.imported import ImportedNetwork

#: The grey around images, which are seen whole; YOLO's own tools take the same.
PADDING = 114


class ImageDetector(FindsBoxes, ImportedNetwork):
    """A network that gives class logits [N, classes, cells] and distances [N, 4, cells] in ``strides``."""

    def __init__(
        self,
        factory: str,
        data: str,
        labels: Sequence[str],
        strides: Sequence[int] = (8, 16, 32),
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        deviation: Sequence[float] = (1.0, 1.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(factory, data, mean=mean, deviation=deviation, **options)
        self.labels = tuple(labels)
        self.preparation = replace(self.preparation, padding=PADDING)
        self.cells = Cells(self.preparation.size, strides)

    def images(self, split: str, smallest_crop: float = 1.0) -> BoxedImages:
        return BoxedImages(
            self.folder / split, len(self.labels), self.preparation, smallest_crop=smallest_crop
        )

    def frame_input(self) -> FrameInput:
        size, mean, deviation = self.preparation.size, self.preparation.mean, self.preparation.deviation
        return FrameInput(
            name="image",
            size=(size, size),
            mean=tuple(255 * value for value in mean),
            deviation=tuple(255 * value for value in deviation),
            keep_aspect=True,
            padding=PADDING,
        )
