"""Detections from a heatmap, and their mean average precision by centre distance (Caesar et al. 2020, "nuScenes: A
Multimodal Dataset for Autonomous Driving", section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetway.data.driving.frames import Grid

Array = NDArray[Any]

#: A detection is right when its centre is this near to an object's; the precision is averaged over all four.
DISTANCES_M = (0.5, 1.0, 2.0, 4.0)
# Parts of the curve below these count as nothing.
_LEAST_RECALL, _LEAST_PRECISION = 0.1, 0.1
_RECALLS = np.linspace(0, 1, 101)
_COUNTED = _RECALLS > _LEAST_RECALL + 1e-9


@dataclass(frozen=True)
class Detections:
    """Found objects, most certain first: ``kinds`` [D], ``scores`` [D] in [0, 1], ``centers`` [D, 2] in metres."""

    kinds: Array
    scores: Array
    centers: Array


def find_objects(heatmap: Array, boxes: Array, grid: Grid, *, limit: int = 24) -> Detections:
    """The highest local maxima of a heatmap of logits [classes, cells, cells], placed by the offsets in ``boxes``."""
    peaks = np.where(heatmap >= _neighbourhood_maximum(heatmap), heatmap, -np.inf).ravel()
    best = np.argsort(-peaks, kind="stable")[:limit]
    best = best[np.isfinite(peaks[best])]
    kinds, rows, columns = np.unravel_index(best, heatmap.shape)
    offsets = boxes[:2, rows, columns].T
    centers = (np.stack([rows, columns], axis=1) + 0.5 + offsets) * grid.cell_m - grid.extent_m
    return Detections(kinds, 1 / (1 + np.exp(-peaks[best].astype(np.float64))), centers)


def match_objects(detections: Detections, kinds: Array, centers: Array) -> list[list[float]]:
    """For each detection its class, its score, and for each of DISTANCES_M 1.0 if it found an object, else 0.0.

    The most certain detection chooses first, among the objects of its class that are left, the nearest.
    """
    hits = np.zeros((len(detections.kinds), len(DISTANCES_M)))
    for level, limit_m in enumerate(DISTANCES_M):
        left = np.ones(len(kinds), dtype=bool)
        for index, (kind, center) in enumerate(zip(detections.kinds, detections.centers, strict=True)):
            free = np.flatnonzero(left & (kinds == kind))
            distances = np.hypot(*(centers[free] - center).T)
            if len(free) and distances.min() < limit_m:
                left[free[distances.argmin()]] = False
                hits[index, level] = 1
    return [
        [float(kind), float(score), *row]
        for kind, score, row in zip(detections.kinds, detections.scores, hits.tolist(), strict=True)
    ]


def mean_average_precision(matches: Sequence[Sequence[float]], object_counts: Array) -> float:
    """Mean over DISTANCES_M and over the classes that have objects; ``matches`` are of all samples, in any order."""
    table = np.asarray(matches, dtype=np.float64).reshape(-1, 2 + len(DISTANCES_M))
    table = table[np.argsort(-table[:, 1], kind="stable")]
    precisions = [
        average_precision(table[table[:, 0] == kind, 2 + level], int(count))
        for kind, count in enumerate(object_counts)
        if count
        for level in range(len(DISTANCES_M))
    ]
    return float(np.mean(precisions)) if precisions else 0.0


def average_precision(hits: Array, objects: int) -> float:
    """Area under the precision over the recall of ``hits`` (1 or 0, most certain first), less what counts as nothing,
    as a share of the most there is."""
    if not len(hits):
        return 0.0
    found = np.cumsum(hits)
    precision = np.interp(_RECALLS, found / objects, found / np.arange(1, len(hits) + 1), right=0)
    return float(np.clip(precision[_COUNTED] - _LEAST_PRECISION, 0, None).mean() / (1 - _LEAST_PRECISION))


def _neighbourhood_maximum(heatmap: Array) -> Array:
    """Largest of the nine values around each place."""
    _, rows, columns = heatmap.shape
    padded = np.pad(heatmap, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.asarray(np.maximum.reduce(shifted))
