"""Cameras and LiDAR fused from above, for two tasks (Liu et al. 2023, "BEVFusion: Multi-Task Multi-Sensor Fusion
with Unified Bird's-Eye View Representation")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from jetway.data.driving.frames import BOX_FEATURES, POINT_FEATURES
from jetway.data.driving.world import GROUNDS, OBJECTS
from jetway.tasks.workloads.bev.swin import SwinEncoder
from jetway.tasks.workloads.bev.view_transform import LiftSplat
from jetway.tasks.workloads.digits import ConvBlock, Residual

# A heatmap starts where one cell in ten is taken for an object, which keeps the first losses small.
_RARE_LOGIT = -2.2


class BevFusion(nn.Module):
    """Images [N, cameras, 3, H, W] and pillars [N, features, points, P, P] to ``heatmap`` and ``segmentation`` logits
    and ``boxes``, all [N, ·, cells, cells]."""

    def __init__(
        self,
        image_encoder: SwinEncoder,
        neck: FeaturePyramid,
        view_transform: LiftSplat,
        lidar_encoder: PillarEncoder,
        channels: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.image_encoder, self.neck, self.view_transform = image_encoder, neck, view_transform
        self.lidar_encoder = lidar_encoder
        self.fuser = ConvBlock(view_transform.context.out_channels + channels, channels)
        self.bev_encoder = BevEncoder(channels, blocks)
        self.detection_head = DetectionHead(channels)
        self.segmentation_head = nn.Sequential(
            ConvBlock(channels, channels), nn.Conv2d(channels, len(GROUNDS), kernel_size=1)
        )

    def forward(self, images: Tensor, pillars: Tensor) -> dict[str, Tensor]:
        seen = self.view_transform(self.neck(self.image_encoder(images.flatten(0, 1))))
        bev = self.bev_encoder(self.fuser(torch.cat([seen, self.lidar_encoder(pillars)], dim=1)))
        heatmap, boxes = self.detection_head(bev)
        return {"heatmap": heatmap, "boxes": boxes, "segmentation": self.segmentation_head(bev)}


class FeaturePyramid(nn.Module):
    """Adds coarser maps to finer ones from the top down and returns the finest (Lin et al. 2017, "FPN")."""

    def __init__(self, dims: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(ConvBlock(dim, channels, kernel=1, relu=False) for dim in dims)
        self.smooth = ConvBlock(channels, channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, summed = (lateral(features) for lateral, features in zip(self.laterals, maps, strict=True))
        for features in reversed(finer):
            summed = features + functional.interpolate(summed, scale_factor=2.0, mode="nearest")
        smoothed: Tensor = self.smooth(functional.relu(summed))
        return smoothed


class PillarEncoder(nn.Module):
    """Pillars of points to a map at half their resolution: each point alone, the largest of a pillar, then
    convolutions (Lang et al. 2019, "PointPillars")."""

    def __init__(self, points: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.point_layer = ConvBlock(POINT_FEATURES, channels // 2, kernel=1)
        self.largest = nn.MaxPool2d((points, 1))
        self.down = ConvBlock(channels // 2, channels, stride=2)
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(blocks)))

    def forward(self, pillars: Tensor) -> Tensor:
        features = self.largest(self.point_layer(pillars.flatten(3)))
        encoded: Tensor = self.blocks(self.down(features.reshape(*features.shape[:2], *pillars.shape[3:])))
        return encoded


class BevEncoder(nn.Module):
    """Convolutions at full and at half resolution, added (Yan et al. 2018, "SECOND", has such a backbone)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.down = ConvBlock(channels, 2 * channels, stride=2)
        self.coarse = nn.Sequential(*(Residual(2 * channels) for _ in range(blocks)))
        self.up = ConvBlock(2 * channels, channels, kernel=1)

    def forward(self, bev: Tensor) -> Tensor:
        fine: Tensor = self.fine(bev)
        coarse = self.up(self.coarse(self.down(fine)))
        return fine + functional.interpolate(coarse, scale_factor=2.0, mode="nearest")


class DetectionHead(nn.Module):
    """Centres as a heatmap of each class, and at each cell the box that would have its centre there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tower = ConvBlock(channels, channels)
        self.heatmap = nn.Conv2d(channels, len(OBJECTS), kernel_size=1)
        self.boxes = nn.Conv2d(channels, BOX_FEATURES, kernel_size=1)
        bias = self.heatmap.bias
        assert bias is not None
        nn.init.constant_(bias, _RARE_LOGIT)

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tower(bev)
        return self.heatmap(features), self.boxes(features)
