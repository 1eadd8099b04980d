"""Boxes x1, y1, x2, y2 in pixels, when only a part of their image is looked at."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]

#: An object of which less is seen is not asked for.
LEAST_SEEN = 0.5


def seen_boxes(boxes: Floats, corner: ArrayLike, scale: float, size: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Boxes [n, 4] in the square that begins at ``corner`` and is scaled to ``size``, and which of them are seen."""
    moved = (boxes - np.tile(np.asarray(corner, np.float32), 2)) * np.float32(scale)
    seen = moved.clip(0, size)
    return seen, _areas(seen) >= LEAST_SEEN * _areas(moved)


def _areas(boxes: Floats) -> Floats:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
