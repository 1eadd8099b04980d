"""Detectors of ultralytics, which the user installs, as networks whose outputs are plain: no NMS, no choice by mode.

    factory: jetway.tasks.workloads.yolo:detector
    arguments: {cfg: yolo11n.yaml, nc: 3}

Its checkpoints are pickles, which Jetway never opens; the README has the command that saves their weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jetway.tasks.errors import ConfigError
from jetway.tasks.workloads.imported import imported

#: Layers of a head that give distances, classes, and distances of their distributions.
HEAD_LAYERS = ("cv2", "cv3", "dfl")


def detector(cfg: str, nc: int) -> nn.Module:
    """A network of ultralytics' architecture file for ``nc`` classes: YOLOv8, YOLO11 and others with their head.

    Of a head that has both, the one-to-many branch is taken. Raises ConfigError for another kind of head.
    """
    network: nn.Module = imported("ultralytics.nn.tasks:DetectionModel")(cfg, nc=nc, verbose=False)
    layers = network.model
    assert isinstance(layers, nn.Sequential)
    layers[-1] = plain_head(layers[-1], cfg)
    return network


def plain_head(head: nn.Module, cfg: str) -> Head:
    """Raises ConfigError for a head without the layers of YOLOv8's."""
    missing = [name for name in HEAD_LAYERS if not hasattr(head, name)]
    if missing:
        raise ConfigError(
            f"workload.options.arguments: {cfg} ends in a {type(head).__name__} without {', '.join(missing)}. Take a "
            "detector of YOLOv8, YOLO11 or YOLO26, or write a factory whose network gives class logits and distances."
        )
    return Head(head)


class Head(nn.Module):
    """The layers of a detection head under their names, so that its weights fit, and what they give.

    Class logits [N, classes, cells], and distances [N, 4, cells] to left, top, right and bottom in strides, as the
    detector of our own gives them.
    """

    cv2: nn.ModuleList
    cv3: nn.ModuleList
    dfl: nn.Module

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.i, self.f = head.i, head.f  # where ultralytics' forward finds its place and its inputs
        self.cv2, self.cv3, self.dfl = head.cv2, head.cv3, head.dfl

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One tensor [N, C, H, W] a level, finest first."""
        distances = [layer(level).flatten(2) for layer, level in zip(self.cv2, features, strict=True)]
        classes = [layer(level).flatten(2) for layer, level in zip(self.cv3, features, strict=True)]
        expected: Tensor = self.dfl(torch.cat(distances, dim=2))
        return torch.cat(classes, dim=2), expected
