"""Other views of a scene, for training: a window of it, scaled up, in another light, its labels alike.

Windows lie inside the scene, so that no pixel is made up; nothing is mirrored, as digits would become others. All is
drawn from torch's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from jetway.data.boxes import Floats, seen_boxes

Bytes = NDArray[np.uint8]

_MIDDLE_GREY = 128.0


@dataclass(frozen=True)
class Augmentation:
    """The largest share of an image's side that is left out, and the largest change of its light."""

    crop_ratio: float
    light_ratio: float

    def at(self, strength: float) -> Augmentation:
        return Augmentation(strength * self.crop_ratio, strength * self.light_ratio)


@dataclass(frozen=True)
class Window:
    """A square of an image of ``size`` pixels, which is scaled to that size."""

    x: int
    y: int
    side: int
    size: int

    def image(self, image: Bytes) -> Bytes:
        """[3, size, size]."""
        scaled = functional.interpolate(
            self._part(image), (self.size, self.size), mode="bilinear", align_corners=False
        )
        return np.asarray(scaled[0].round().byte().numpy())

    def mask(self, mask: Bytes) -> Bytes:
        """[size, size], of the same classes."""
        scaled = functional.interpolate(self._part(mask[None]), (self.size, self.size), mode="nearest-exact")
        return np.asarray(scaled[0, 0].byte().numpy())

    def boxes(self, boxes: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Boxes [n, 4] as far as they are seen, and which of them are seen enough of."""
        return seen_boxes(boxes, (self.x, self.y), self.size / self.side, self.size)

    def _part(self, values: Bytes) -> torch.Tensor:
        rows, columns = slice(self.y, self.y + self.side), slice(self.x, self.x + self.side)
        return torch.from_numpy(values[None, :, rows, columns]).float()


def random_window(size: int, augmentation: Augmentation) -> Window:
    side = size - _drawn(round(augmentation.crop_ratio * size))
    return Window(_drawn(size - side), _drawn(size - side), side, size)


def randomly_lit(image: Bytes, augmentation: Augmentation) -> Bytes:
    """The image with another contrast and another brightness."""
    contrast, brightness = (augmentation.light_ratio * (2 * torch.rand(2) - 1)).tolist()
    lit = (image - _MIDDLE_GREY) * (1 + contrast) + _MIDDLE_GREY * (1 + brightness)
    return np.asarray(lit.round().clip(0, 255), dtype=np.uint8)


def _drawn(largest: int) -> int:
    return int(torch.randint(largest + 1, ()))
