"""Reference workload: cameras and LiDAR of a driving vehicle fused from above, to detect objects and segment ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.driving.frames import POINT_FEATURES, Augmentation, DrivingFrames, Grid
from jetway.data.driving.sensors import Rig
from jetway.data.driving.world import GROUNDS, OBJECTS
from jetway.data.light import light_of
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs, Record, Workload
from jetway.tasks.workloads.bev.detection import find_objects, match_objects, mean_average_precision
from jetway.tasks.workloads.bev.network import BevFusion, FeaturePyramid, PillarEncoder
from jetway.tasks.workloads.bev.swin import SwinEncoder
from jetway.tasks.workloads.bev.view_transform import DepthBins, LiftSplat, VoxelViews, voxel_centers

TRAINING_AUGMENTATION = Augmentation(brightness_ratio=0.25, mirror=True)
# QAT adjusts weights, it learns no new invariance: weaker light changes keep the ranges those of real images.
QAT_AUGMENTATION = Augmentation(brightness_ratio=0.05, mirror=True)

# Stride of the feature map that is lifted: the first stage of the image encoder.
_STRIDE = 8
_VOXEL_HEIGHTS_M = (0.0, 0.8, 1.8)
_BOX_WEIGHT, _SEGMENTATION_WEIGHT = 0.5, 1.0
_GROUND_WEIGHTS = (0.7, 1.0, 2.0, 2.0)


class BevFusionWorkload(Workload):
    """3D detection and ground segmentation on a map from above, of ``cameras`` images of ``image_size`` and pillars.

    The map reaches ``extent_m`` to each side in ``cells``×``cells``; it has two pillars to a cell along each side.
    """

    output_names = ("heatmap", "boxes", "segmentation")
    metrics = (
        Metric(
            name="map",
            best=1.0,
            description="mean average precision by centre distance, as nuScenes defines it",
        ),
        Metric(
            name="miou", best=1.0, description="mean intersection over union of the classes of the ground"
        ),
    )
    labels = OBJECTS

    def __init__(
        self,
        cameras: int = 4,
        image_size: tuple[int, int] = (48, 96),
        view_degrees: float = 95.0,
        pitch_degrees: float = 10.0,
        extent_m: float = 12.0,
        cells: int = 24,
        channels: int = 48,
        blocks: int = 1,
        dims: tuple[int, ...] = (48, 96),
        depths: tuple[int, ...] = (2, 2),
        num_heads: tuple[int, ...] = (4, 8),
        window: tuple[int, int] = (3, 6),
        depth_bins: int = 16,
        frames: int = 1600,
        evaluation_frames: int = 400,
    ) -> None:
        if cells % 2:
            raise ValueError(
                f"cells is {cells}, but must be even: the map is also looked at in half its resolution"
            )
        self.rig = Rig(cameras, (image_size[0], image_size[1]), view_degrees, pitch_degrees)
        self.grid = Grid(extent_m, cells, pillars=2 * cells)
        self.channels, self.blocks = channels, blocks
        self.dims, self.depths, self.num_heads = tuple(dims), tuple(depths), tuple(num_heads)
        self.window, self.depth_bins = (window[0], window[1]), depth_bins
        self.frames, self.evaluation_frames = frames, evaluation_frames

    def network(self) -> nn.Module:
        points = self.grid.points_per_pillar
        return BevFusion(
            SwinEncoder(self.rig.image_size, self.dims, self.depths, self.num_heads, self.window),
            FeaturePyramid(self.dims, self.channels),
            self._view_transform(),
            PillarEncoder(points, self.channels, self.blocks),
            self.channels,
            self.blocks,
        )

    def _view_transform(self) -> LiftSplat:
        grid, heights = self.grid, _VOXEL_HEIGHTS_M
        bins = DepthBins(1.0, 1.5 * grid.extent_m, self.depth_bins)
        voxels = voxel_centers(grid.cell_centers(), heights)
        views = VoxelViews.of(self.rig.ring(), _STRIDE, voxels, bins)
        sizes = {"cameras": self.rig.cameras, "heights": len(heights), "cells": grid.cells}
        return LiftSplat(self.channels, self.channels, bins.count, views, **sizes)

    def example_inputs(self) -> Inputs:
        grid = self.grid
        return {
            "images": torch.zeros(1, self.rig.cameras, 3, *self.rig.image_size),
            "pillars": torch.zeros(1, POINT_FEATURES, grid.points_per_pillar, grid.pillars, grid.pillars),
        }

    def train_data(self) -> DrivingFrames:
        return DrivingFrames("train", self.frames, self.rig, self.grid, TRAINING_AUGMENTATION)

    def qat_data(self) -> DrivingFrames:
        return DrivingFrames("train", self.frames, self.rig, self.grid, QAT_AUGMENTATION)

    def calibration_data(self) -> DrivingFrames:
        return DrivingFrames("calibration", 128, self.rig, self.grid)

    def evaluation_data(self) -> DrivingFrames:
        return DrivingFrames("evaluation", self.evaluation_frames, self.rig, self.grid)

    def scene_of(self, inputs: Inputs, target: Any) -> str:
        """The light, and what is there to be found."""
        kinds = target["objects"][:, 0]
        there = [name for index, name in enumerate(OBJECTS) if (kinds == index).any()]
        return f"{light_of(inputs['images'])}, {' and '.join(there) or 'nothing'}"

    def loss(self, outputs: Outputs, target: Any) -> Tensor:
        """Focal loss of the heatmap, distance of the boxes at centres, and cross entropy of the ground."""
        weights = torch.tensor(_GROUND_WEIGHTS, device=outputs["segmentation"].device)
        ground = functional.cross_entropy(outputs["segmentation"], target["segmentation"], weights)
        return (
            heatmap_loss(outputs["heatmap"], target["heatmap"])
            + _BOX_WEIGHT * box_loss(outputs["boxes"], target["boxes"], target["heatmap"])
            + _SEGMENTATION_WEIGHT * ground
        )

    def score_sample(self, outputs: Mapping[str, np.ndarray[Any, Any]], target: Any) -> Record:
        """What was found and missed, and for each class of the ground the cells in both, and in either."""
        objects = target["objects"].numpy()
        objects = objects[objects[:, 0] >= 0]
        found = find_objects(outputs["heatmap"], outputs["boxes"], self.grid)
        predicted, true = outputs["segmentation"].argmax(axis=0), target["segmentation"].numpy()
        classes = range(len(GROUNDS))
        return {
            "matches": match_objects(found, objects[:, 0], objects[:, 1:]),
            "objects": np.bincount(objects[:, 0].astype(int), minlength=len(OBJECTS)).tolist(),
            "intersection": [int(((predicted == c) & (true == c)).sum()) for c in classes],
            "union": [int(((predicted == c) | (true == c)).sum()) for c in classes],
        }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        matches = [match for record in records for match in record["matches"]]
        objects, both, either = (
            np.sum([record[key] for record in records], axis=0)
            for key in ("objects", "intersection", "union")
        )
        return {
            "map": mean_average_precision(matches, objects),
            "miou": float(np.mean(both[either > 0] / either[either > 0])),
        }


def heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss, softer around centres (Law & Deng 2018, "CornerNet", with its exponents 2 and 4), by object."""
    at_center = target == 1
    found, missed = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    probability = logits.sigmoid()
    positive = (1 - probability).square() * found * at_center
    negative = probability.square() * missed * (1 - target).pow(4)
    return -(positive + negative).sum() / at_center.sum().clamp(min=1)


def box_loss(boxes: Tensor, target: Tensor, heatmap: Tensor) -> Tensor:
    """Mean absolute error of the boxes [N, features, cells, cells] where a centre is."""
    at_center = (heatmap == 1).any(dim=1, keepdim=True)
    error = (boxes - target).abs() * at_center
    return error.sum() / (at_center.sum().clamp(min=1) * boxes.shape[1])
