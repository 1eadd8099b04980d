"""A procedural piece of street around the ego vehicle: painted ground, and boxes that stand on it.

Coordinates are the ego's, in metres: x forward, y to the left, z up from the ground; yaw counts from x towards y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

#: What is labelled, in the order of the heads' classes. A bush is only in the way.
OBJECTS = ("car", "truck", "pedestrian")
KINDS = (*OBJECTS, "bush")
#: Ordered so that of two classes at one place the larger one is seen.
GROUNDS = ("terrain", "road", "lane_marking", "crosswalk")

# Length, width and height of each kind; bushes pass for cars and pedestrians by their size.
_SIZES = np.array([[4.2, 1.8, 1.5], [7.0, 2.5, 3.0], [0.7, 0.7, 1.75], [1.6, 1.3, 1.5]])
_SIZE_SPREAD = np.array([0.08, 0.12, 0.12, 0.5])
_KIND_SHARES = (0.4, 0.15, 0.25, 0.2)
_CANDIDATES = 14
_MARKING_HALF_WIDTH_M = 0.6
_CROSSWALK_HALF_WIDTH_M = 1.5
_EGO_RADIUS_M = 2.5


@dataclass(frozen=True)
class Road:
    """A straight road; ``offset_m`` is its middle's distance to the left of the ego, ``crosswalk_m`` along it."""

    yaw: float
    offset_m: float
    half_width_m: float
    crosswalk_m: float

    def ground(self, x: Floats, y: Floats) -> NDArray[np.int8]:
        """Index into GROUNDS at each place; 0 beside the road."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        along, across = x * cos + y * sin, y * cos - x * sin - self.offset_m
        on_road = np.abs(across) < self.half_width_m
        marked = np.abs(across) < _MARKING_HALF_WIDTH_M
        crossed = np.abs(along - self.crosswalk_m) < _CROSSWALK_HALF_WIDTH_M
        return np.asarray(
            on_road * np.maximum(np.where(marked, 2, 1), np.where(crossed, 3, 0)), dtype=np.int8
        )


@dataclass(frozen=True)
class Boxes:
    """Upright boxes: ``kinds`` [B] index KINDS, ``centers`` and ``sizes`` [B, 3], ``yaws`` [B], ``colors`` [B, 3]."""

    kinds: Integers
    centers: Floats
    sizes: Floats
    yaws: Floats
    colors: Floats

    def __len__(self) -> int:
        return len(self.kinds)

    def corners(self) -> Floats:
        """The eight corners of each box, [B, 8, 3]."""
        signs = np.stack(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5], indexing="ij"), -1).reshape(8, 3)
        local = self.sizes[:, None] * signs.astype(np.float32)
        cos, sin = np.cos(self.yaws)[:, None], np.sin(self.yaws)[:, None]
        x, y = local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos
        return self.centers[:, None] + np.stack([x, y, local[..., 2]], axis=-1)


@dataclass(frozen=True)
class Scene:
    """One moment: roads, boxes, and the light (gain of each colour)."""

    roads: tuple[Road, ...]
    boxes: Boxes
    light: Floats

    def ground(self, x: Floats, y: Floats) -> NDArray[np.int8]:
        """Index into GROUNDS at each place."""
        grounds: NDArray[np.int8] = np.maximum.reduce([road.ground(x, y) for road in self.roads])
        return grounds


def make_scene(rng: np.random.Generator, extent_m: float) -> Scene:
    """A street whose boxes have their centres within ``extent_m`` of the ego, along x and along y."""
    roads = _make_roads(rng, extent_m)
    light = rng.uniform(0.65, 1.15) * rng.uniform(0.92, 1.08, size=3)
    return Scene(roads, _make_boxes(rng, roads[0], extent_m), light.astype(np.float32))


def _make_roads(rng: np.random.Generator, extent_m: float) -> tuple[Road, ...]:
    yaw = rng.normal(0, 0.25)
    roads = [_make_road(rng, yaw, rng.uniform(-3, 3), extent_m)]
    if rng.random() < 0.5:
        roads.append(_make_road(rng, yaw + math.pi / 2 + rng.normal(0, 0.1), rng.uniform(-9, 9), extent_m))
    return tuple(roads)


def _make_road(rng: np.random.Generator, yaw: float, offset_m: float, extent_m: float) -> Road:
    return Road(yaw, offset_m, rng.uniform(4, 6.5), rng.uniform(-extent_m, extent_m))


def _make_boxes(rng: np.random.Generator, road: Road, extent_m: float) -> Boxes:
    """Of some candidates those that are free of the ego and of each other."""
    count = int(rng.integers(4, _CANDIDATES + 1))
    kinds = rng.choice(len(KINDS), size=count, p=_KIND_SHARES)
    sizes = _SIZES[kinds] * (1 + _SIZE_SPREAD[kinds][:, None] * rng.uniform(-1, 1, size=(count, 3)))
    places, yaws = _places(rng, kinds, road, extent_m)
    radii = np.hypot(sizes[:, 0], sizes[:, 1]) / 2
    kept = _free(places, radii, extent_m)
    colors = np.where(
        kinds[:, None] == KINDS.index("bush"), _greens(rng, count), rng.uniform(0, 1, (count, 3))
    )
    centers = np.column_stack([places, sizes[:, 2] / 2])
    values: list[Any] = [centers, sizes, yaws, colors]
    return Boxes(kinds[kept].astype(np.int64), *(value[kept].astype(np.float32) for value in values))


def _places(
    rng: np.random.Generator, kinds: Integers, road: Road, extent_m: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Most vehicles follow their side of the road; everything else is anywhere."""
    count = len(kinds)
    side = rng.choice([-1, 1], size=count)
    across = road.offset_m + side * road.half_width_m / 2 + rng.normal(0, 0.3, size=count)
    along = rng.uniform(-extent_m, extent_m, size=count)
    cos, sin = math.cos(road.yaw), math.sin(road.yaw)
    on_road = np.column_stack([along * cos - across * sin, along * sin + across * cos])
    following = (kinds < OBJECTS.index("pedestrian")) & (rng.random(count) < 0.7)
    places = np.where(following[:, None], on_road, rng.uniform(-extent_m, extent_m, size=(count, 2)))
    heading = road.yaw + np.where(side > 0, math.pi, 0) + rng.normal(0, 0.08, size=count)
    return places, np.where(following, heading, rng.uniform(-math.pi, math.pi, size=count))


def _greens(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    return np.array([0.18, 0.42, 0.12]) * rng.uniform(0.6, 1.4, size=(count, 1))


def _free(places: NDArray[np.float64], radii: NDArray[np.float64], extent_m: float) -> list[int]:
    kept: list[int] = []
    for index, place in enumerate(places):
        distances = np.hypot(*(places[kept] - place).T)
        apart = bool((distances > radii[kept] + radii[index]).all())
        off_ego = math.hypot(*place) > _EGO_RADIUS_M + radii[index]
        if apart and off_ego and float(np.abs(place).max()) < extent_m:
            kept.append(index)
    return kept
