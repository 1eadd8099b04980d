"""The sensors on the ego vehicle: a ring of pinhole cameras, and a spinning LiDAR on the roof."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jetway.data.driving.rays import GROUND, NOTHING, Hits, cast_rays
from jetway.data.driving.world import Floats, Scene

# Red, green, blue of terrain, road, lane marking and crosswalk, and of the sky.
_GROUND_COLORS = np.array(
    [[0.32, 0.42, 0.22], [0.36, 0.36, 0.38], [0.85, 0.78, 0.45], [0.88, 0.88, 0.90]], dtype=np.float32
)
_SKY_COLOR = np.array([0.62, 0.75, 0.95], dtype=np.float32)
_TO_SUN = np.array([0.4, -0.5, 0.77], dtype=np.float32)
_AMBIENT = 0.55
_PIXEL_NOISE = 0.05

# How much of the light grounds and kinds of boxes send back.
_GROUND_REFLECTIVITY = np.array([0.45, 0.20, 0.65, 0.75], dtype=np.float32)
_KIND_REFLECTIVITY = np.array([0.60, 0.60, 0.35, 0.35], dtype=np.float32)
_INTENSITY_NOISE = 0.12
_RANGE_NOISE_M = 0.03
_DROPOUT_RATIO = 0.1


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. ``axes`` has the ego's vectors to the right, down and forward as rows."""

    position: Floats
    axes: Floats
    focal_px: float
    height: int
    width: int

    def rays(self) -> Floats:
        """Direction of each pixel's middle, row by row, [height × width, 3]; its component forward is 1."""
        v, u = np.mgrid[: self.height, : self.width].reshape(2, -1) + 0.5
        x, y = (u - self.width / 2) / self.focal_px, (v - self.height / 2) / self.focal_px
        return np.asarray(np.column_stack([x, y, np.ones_like(x)]) @ self.axes, dtype=np.float32)

    def project(self, points: Floats) -> Floats:
        """Points [..., 3] to column, row and depth along the optical axis [..., 3]; depth ≤ 0 is behind."""
        local = (points - self.position) @ self.axes.T
        depth = local[..., 2:]
        with np.errstate(divide="ignore", invalid="ignore"):
            pixels = local[..., :2] / depth * self.focal_px + np.array([self.width / 2, self.height / 2])
        return np.concatenate([pixels, depth], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Rig:
    """What the vehicle carries: ``cameras`` of ``image_size`` (height, width) in a ring, and the LiDAR's beams."""

    cameras: int = 4
    image_size: tuple[int, int] = (48, 96)
    view_degrees: float = 95.0
    pitch_degrees: float = 10.0
    beams: int = 24
    azimuths: int = 180

    def ring(self) -> list[Camera]:
        """The cameras, the first one looking forward, then counterclockwise."""
        return [self._camera(2 * math.pi * index / self.cameras) for index in range(self.cameras)]

    def _camera(self, yaw: float) -> Camera:
        pitch = math.radians(self.pitch_degrees)
        height, width = self.image_size
        forward = np.array(
            [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), -math.sin(pitch)]
        )
        right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
        axes = np.stack([right, np.cross(forward, right), forward]).astype(np.float32)
        position = np.array([0.4 * math.cos(yaw), 0.4 * math.sin(yaw), 1.7], dtype=np.float32)
        return Camera(
            position, axes, width / 2 / math.tan(math.radians(self.view_degrees) / 2), height, width
        )

    def beam_directions(self) -> Floats:
        """Unit vectors of all beams of one turn, [beams × azimuths, 3]."""
        elevation, azimuth = np.meshgrid(
            np.radians(np.linspace(-32, 2, self.beams)),
            np.linspace(-math.pi, math.pi, self.azimuths, endpoint=False),
        )
        flat = np.cos(elevation)
        directions = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
        return directions.reshape(-1, 3).astype(np.float32)


LIDAR_POSITION = np.array([0.0, 0.0, 1.9], dtype=np.float32)


def take_images(scene: Scene, rig: Rig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What the cameras see, [cameras, 3, height, width]."""
    return np.stack([_take_image(scene, camera, rng) for camera in rig.ring()])


def scan(scene: Scene, rig: Rig, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Points [P, 4] of one LiDAR turn (x, y, z, intensity), with noise, and what each hit (box or GROUND)."""
    directions = rig.beam_directions()
    hits = cast_rays(scene.boxes, LIDAR_POSITION, directions)
    returned = (hits.surfaces != NOTHING) & (rng.random(len(directions)) >= _DROPOUT_RATIO)
    ranges = hits.distances[returned] + rng.normal(0, _RANGE_NOISE_M, size=int(returned.sum()))
    points = LIDAR_POSITION + directions[returned] * ranges[:, None]
    intensity = _intensities(scene, hits, directions, rng)[returned]
    return np.column_stack([points, intensity]).astype(np.float32), hits.surfaces[returned]


def _take_image(scene: Scene, camera: Camera, rng: np.random.Generator) -> NDArray[np.uint8]:
    directions = camera.rays()
    hits = cast_rays(scene.boxes, camera.position, directions)
    shade = _AMBIENT + (1 - _AMBIENT) * np.maximum(hits.normals @ _TO_SUN, 0)
    colors = _surface_values(scene, hits, camera.position, directions, _GROUND_COLORS, scene.boxes.colors)
    colors = colors * shade[:, None]
    colors[hits.surfaces == NOTHING] = _SKY_COLOR
    colors = colors * scene.light + rng.normal(0, _PIXEL_NOISE, size=colors.shape)
    pixels: NDArray[np.uint8] = np.clip(colors * 255, 0, 255).astype(np.uint8)
    return pixels.reshape(camera.height, camera.width, 3).transpose(2, 0, 1)


def _intensities(scene: Scene, hits: Hits, directions: Floats, rng: np.random.Generator) -> Floats:
    boxes = _KIND_REFLECTIVITY[scene.boxes.kinds]
    values = _surface_values(scene, hits, LIDAR_POSITION, directions, _GROUND_REFLECTIVITY, boxes)
    return np.clip(values + rng.normal(0, _INTENSITY_NOISE, size=len(values)), 0, 1).astype(np.float32)


def _surface_values(
    scene: Scene, hits: Hits, origin: Floats, directions: Floats, of_grounds: Floats, of_boxes: Floats
) -> Floats:
    """A property of what each ray met; zeros where it met nothing."""
    values = np.zeros((len(directions), *of_grounds.shape[1:]), dtype=np.float32)
    on_ground, on_box = hits.surfaces == GROUND, hits.surfaces >= 0
    places = origin + directions[on_ground] * hits.distances[on_ground, None]
    values[on_ground] = of_grounds[scene.ground(places[:, 0], places[:, 1])]
    values[on_box] = of_boxes[hits.surfaces[on_box]]
    return values
