"""From image features to a map from above: lift-splat (Philion & Fidler 2020, "Lift, Splat, Shoot: Encoding Images
from Arbitrary Camera Rigs by Implicitly Unprojecting to 3D").

Every pixel spreads its context along its ray by a depth distribution. Where each ray passes is fixed by the rig, so
the splat is computed from the other end: each voxel above a BEV cell knows the pixel and the depth bin that it falls
into, and takes their product. That is two gathers with constant indices, which every engine has; a scatter with
addition is not in TensorRT 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jetway.data.driving.sensors import Camera

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class DepthBins:
    """Equal bins of the depth along the optical axis."""

    nearest_m: float
    farthest_m: float
    count: int

    def index(self, depth_m: NDArray[np.float32]) -> Indices:
        """Bin of each depth; negative or ``count`` and more where there is none."""
        share = (depth_m - self.nearest_m) / (self.farthest_m - self.nearest_m)
        return np.asarray(np.floor(share * self.count), dtype=np.int64)


@dataclass(frozen=True)
class VoxelViews:
    """For each voxel [V], flat: the feature pixel that sees it (over all cameras), the depth bin, and whether any does.

    Where several cameras see a voxel, the one counts that has it closest to the middle of its image.
    """

    pixels: Indices
    bins: Indices
    seen: NDArray[np.bool_]

    @classmethod
    def of(
        cls, cameras: Sequence[Camera], stride: int, voxels: NDArray[np.float32], depths: DepthBins
    ) -> VoxelViews:
        """Views of ``voxels`` [V, 3] in feature maps whose pixels are ``stride`` image pixels wide."""
        views = [_view(camera, stride, voxels, depths) for camera in cameras]
        pixels, bins, off_center = (np.stack(parts) for parts in zip(*views, strict=True))
        best = off_center.argmin(axis=0)
        chosen = best, np.arange(len(voxels))
        seen = np.isfinite(off_center[chosen])
        a_map = (cameras[0].height // stride) * (cameras[0].width // stride)
        return cls(np.where(seen, best * a_map + pixels[chosen], 0), np.where(seen, bins[chosen], 0), seen)


class LiftSplat(nn.Module):
    """Features [N × cameras, C, h, w] to a map from above [N, context, cells, cells]."""

    pixel_index: Tensor
    depth_index: Tensor
    seen: Tensor

    def __init__(
        self,
        channels: int,
        context: int,
        bins: int,
        views: VoxelViews,
        *,
        cameras: int,
        heights: int,
        cells: int,
    ) -> None:
        super().__init__()
        self.cameras, self.bins, self.heights, self.cells = cameras, bins, heights, cells
        self.depth = nn.Conv2d(channels, bins, kernel_size=1)
        self.context = nn.Conv2d(channels, context, kernel_size=1)
        self.register_buffer("pixel_index", torch.from_numpy(views.pixels), persistent=False)
        self.register_buffer(
            "depth_index", torch.from_numpy(views.pixels * bins + views.bins), persistent=False
        )
        self.register_buffer("seen", torch.from_numpy(views.seen).float()[:, None], persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        share = self._by_pixel(self.depth(features)).softmax(dim=2).flatten(1)
        context = self._by_pixel(self.context(features))
        weight = share.index_select(1, self.depth_index)[..., None] * self.seen
        lifted = context.index_select(1, self.pixel_index) * weight
        columns = lifted.reshape(-1, self.heights, self.cells * self.cells, context.shape[-1]).sum(dim=1)
        return columns.transpose(1, 2).reshape(-1, context.shape[-1], self.cells, self.cells)

    def _pixels(self, features: Tensor) -> int:
        return self.cameras * features.shape[-2] * features.shape[-1]

    def _by_pixel(self, maps: Tensor) -> Tensor:
        """[N × cameras, C, h, w] to [N, pixels of all cameras, C]."""
        return maps.flatten(2).transpose(1, 2).reshape(-1, self._pixels(maps), maps.shape[1])


def voxel_centers(cells: NDArray[np.float32], heights_m: Sequence[float]) -> NDArray[np.float32]:
    """Places [heights × cells, 3] above the cells' middles [cells, cells, 2]."""
    flat = cells.reshape(-1, 2)
    return np.concatenate([np.column_stack([flat, np.full(len(flat), z)]) for z in heights_m]).astype(
        np.float32
    )


def _view(
    camera: Camera, stride: int, voxels: NDArray[np.float32], depths: DepthBins
) -> tuple[Indices, Indices, NDArray[np.float32]]:
    """Feature pixel and depth bin of each voxel, and how far off the image's middle it is: inf where not seen."""
    u, v, depth = camera.project(voxels).T
    bins = depths.index(depth)
    inside = (depth > 0) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    inside &= (bins >= 0) & (bins < depths.count)
    column, row = (np.where(inside, place, 0).astype(np.int64) // stride for place in (u, v))
    off_center = np.where(inside, np.abs(u - camera.width / 2), np.inf).astype(np.float32)
    return row * (camera.width // stride) + column, bins, off_center
