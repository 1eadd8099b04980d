"""Frames of the procedural world as a data set: images and pillars in, heatmap, boxes and ground classes out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from jetway.data.driving.sensors import Rig, scan, take_images
from jetway.data.driving.world import OBJECTS, Boxes, Floats, make_scene

Split = Literal["train", "calibration", "evaluation"]
_SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")
_WORLD_SEED = 2022

#: Of each point: offset from its pillar's middle along x and y (in pillars), height (m), intensity, and a one.
POINT_FEATURES = 5
#: Offset from the cell's middle along x and y (in cells), z (m), logarithms of length, width and height (m), and
#: sine and cosine of twice the yaw, as a box looks the same from both ends.
BOX_FEATURES = 8
MAX_OBJECTS = 16
# Small ones take 150 kB each.
_KEPT_FRAMES = 4096
# An object that fewer points hit is not asked for.
_LEAST_POINTS = 3
_HEATMAP_SIGMA_CELLS = 0.8
_BRIGHTNESS_MEAN, _BRIGHTNESS_DEVIATION = 0.40, 0.22


@dataclass(frozen=True)
class Grid:
    """The square around the ego, ``extent_m`` to each side, seen from above: x along rows, y along columns."""

    extent_m: float = 12.0
    cells: int = 24
    pillars: int = 48
    points_per_pillar: int = 4

    @property
    def cell_m(self) -> float:
        return 2 * self.extent_m / self.cells

    @property
    def pillar_m(self) -> float:
        return 2 * self.extent_m / self.pillars

    def cell_centers(self) -> Floats:
        """x and y of each cell's middle, [cells, cells, 2]."""
        middles = (np.arange(self.cells, dtype=np.float32) + 0.5) * self.cell_m - self.extent_m
        return np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1)


@dataclass(frozen=True)
class Augmentation:
    """Largest change of brightness (a fraction) and whether left and right may change sides."""

    brightness_ratio: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Frame:
    """One moment as it is kept: small types, and targets as the losses and metrics want them."""

    images: NDArray[np.uint8]
    pillars: NDArray[np.float16]
    heatmap: Floats
    boxes: Floats
    segmentation: NDArray[np.int64]
    #: Class, x and y (m) of each object asked for, filled up with class -1, [MAX_OBJECTS, 3].
    objects: Floats


class DrivingFrames(Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """``count`` frames of one split. Inputs are float32 ``images`` [cameras, 3, height, width], of about mean 0 and
    deviation 1, and ``pillars`` [POINT_FEATURES, points_per_pillar, pillars, pillars]."""

    def __init__(
        self, split: Split, count: int, rig: Rig, grid: Grid, augmentation: Augmentation | None = None
    ) -> None:
        self.split: Split = split
        self.count, self.rig, self.grid = count, rig, grid
        self.augmentation = augmentation

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(f"frame {index} of {self.count}")
        frame = make_frame(self.split, index, self.rig, self.grid)
        brightness = torch.from_numpy(frame.images).float() / 255
        inputs = {"images": brightness, "pillars": torch.from_numpy(frame.pillars).float()}
        names = ("heatmap", "boxes", "segmentation", "objects")
        target = {name: torch.from_numpy(getattr(frame, name)) for name in names}
        if self.augmentation:
            inputs, target = _augmented(inputs, target, self.augmentation)
        inputs["images"] = (inputs["images"] - _BRIGHTNESS_MEAN) / _BRIGHTNESS_DEVIATION
        return inputs, target


def frame_seed(split: Split, index: int) -> np.random.SeedSequence:
    """Where a frame's randomness comes from: no two frames of any splits share it."""
    return np.random.SeedSequence([_WORLD_SEED, _SPLITS.index(split), index])


@functools.lru_cache(maxsize=_KEPT_FRAMES)
def make_frame(split: Split, index: int, rig: Rig, grid: Grid) -> Frame:
    """The frame with this number; the same every time, and kept, as every epoch asks for it again."""
    rng = np.random.default_rng(frame_seed(split, index))
    scene = make_scene(rng, grid.extent_m)
    points, surfaces = scan(scene, rig, rng)
    centers = grid.cell_centers()
    wanted = _wanted_objects(scene.boxes, surfaces)
    heatmap, boxes = _detection_targets(scene.boxes, wanted, grid)
    return Frame(
        images=take_images(scene, rig, rng),
        pillars=fill_pillars(rng.permutation(points), grid),
        heatmap=heatmap,
        boxes=boxes,
        segmentation=scene.ground(centers[..., 0], centers[..., 1]).astype(np.int64),
        objects=_objects(scene.boxes, wanted),
    )


def fill_pillars(points: Floats, grid: Grid) -> NDArray[np.float16]:
    """The first points [P, 4] that fall into each pillar, [POINT_FEATURES, points, pillars, pillars]; else zeros
    (Lang et al. 2019, "PointPillars")."""
    places = (points[:, :2] + grid.extent_m) / grid.pillar_m
    inside = ((places >= 0) & (places < grid.pillars)).all(axis=1)
    points, places = points[inside], places[inside]
    row, column = places.astype(np.int64).T
    features = np.column_stack([places % 1 - 0.5, points[:, 2:], np.ones(len(points))])
    cell = row * grid.pillars + column
    order = np.argsort(cell, kind="stable")
    starts = np.searchsorted(cell[order], cell[order])
    rank = np.arange(len(order)) - starts
    kept, rank = order[rank < grid.points_per_pillar], rank[rank < grid.points_per_pillar]
    filled = np.zeros((POINT_FEATURES, grid.points_per_pillar, grid.pillars, grid.pillars), dtype=np.float16)
    filled[:, rank, row[kept], column[kept]] = features[kept].T
    return filled


def _wanted_objects(boxes: Boxes, surfaces: NDArray[np.int64]) -> NDArray[np.int64]:
    points = np.bincount(surfaces[surfaces >= 0], minlength=len(boxes))
    return np.flatnonzero((points >= _LEAST_POINTS) & (boxes.kinds < len(OBJECTS)))[:MAX_OBJECTS]


def _detection_targets(boxes: Boxes, wanted: NDArray[np.int64], grid: Grid) -> tuple[Floats, Floats]:
    """Heatmap [classes, cells, cells] that is 1 at centres and falls off around them, and at each centre its box
    [BOX_FEATURES, cells, cells] (Zhou et al. 2019, "Objects as Points"; Yin et al. 2021, "CenterPoint")."""
    heatmap = np.zeros((len(OBJECTS), grid.cells, grid.cells), dtype=np.float32)
    features = np.zeros((BOX_FEATURES, grid.cells, grid.cells), dtype=np.float32)
    rows, columns = np.mgrid[: grid.cells, : grid.cells]
    for index in wanted:
        place = (boxes.centers[index, :2] + grid.extent_m) / grid.cell_m
        row, column = place.astype(np.int64)
        distance = np.square(rows - row) + np.square(columns - column)
        peak = np.exp(-distance / (2 * _HEATMAP_SIGMA_CELLS**2))
        kind = boxes.kinds[index]
        heatmap[kind] = np.maximum(heatmap[kind], peak)
        double_yaw = 2 * boxes.yaws[index]
        features[:, row, column] = [
            *(place % 1 - 0.5),
            boxes.centers[index, 2],
            *np.log(boxes.sizes[index]),
            np.sin(double_yaw),
            np.cos(double_yaw),
        ]
    return heatmap, features


def _objects(boxes: Boxes, wanted: NDArray[np.int64]) -> Floats:
    objects = np.full((MAX_OBJECTS, 3), -1, dtype=np.float32)
    objects[: len(wanted)] = np.column_stack([boxes.kinds[wanted], boxes.centers[wanted, :2]])
    return objects


def _augmented(
    inputs: dict[str, Tensor], target: dict[str, Tensor], augmentation: Augmentation
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Another light, and the world mirrored or not, drawn from torch's global generator."""
    gain, side = (2 * torch.rand(2) - 1).tolist()
    images = inputs["images"] * (1 + augmentation.brightness_ratio * gain)
    inputs = {**inputs, "images": images}
    return mirrored(inputs, target) if augmentation.mirror and side > 0 else (inputs, target)


def mirrored(
    inputs: dict[str, Tensor], target: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same world with left and right exchanged."""
    images, pillars, boxes = inputs["images"], inputs["pillars"], target["boxes"]
    ring = [-camera % len(images) for camera in range(len(images))]
    opposite_y = torch.tensor([1.0, -1, 1, 1, 1]).view(-1, 1, 1, 1)
    opposite_box = torch.tensor([1.0, -1, 1, 1, 1, 1, -1, 1]).view(-1, 1, 1)
    objects = target["objects"].clone()
    objects[objects[:, 0] >= 0, 2] *= -1
    return (
        {"images": images[ring].flip(-1), "pillars": pillars.flip(-1) * opposite_y},
        {
            "heatmap": target["heatmap"].flip(-1),
            "boxes": boxes.flip(-1) * opposite_box,
            "segmentation": target["segmentation"].flip(-1),
            "objects": objects,
        },
    )
