"""Where rays meet a scene: one intersection for cameras and LiDAR, so that they agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jetway.data.driving.world import Boxes, Floats, Integers

GROUND, NOTHING = -1, -2
_NEAREST = np.float32(1e-3)
# Stands for 0, by which a distance cannot be divided.
_PARALLEL = np.float32(1e-12)


@dataclass(frozen=True)
class Hits:
    """Of each ray [R]: how many of its direction's lengths it went (inf where it met nothing), what it met
    (the index of a box, GROUND or NOTHING), and the surface's outward normal [R, 3]."""

    distances: Floats
    surfaces: Integers
    normals: Floats


def cast_rays(boxes: Boxes, origin: Floats, directions: Floats) -> Hits:
    """First surface that rays from ``origin`` [3] along ``directions`` [R, 3] meet, by the slab method
    (Kay & Kajiya 1986, "Ray Tracing Complex Scenes")."""
    downward = directions[:, 2] < 0
    ground = np.where(downward, -origin[2] / np.where(downward, directions[:, 2], -1), np.float32(np.inf))
    distances, axes = _enter(boxes, origin, directions)
    candidates = np.concatenate([distances, ground[None]])
    nearest, best = candidates.argmin(axis=0), candidates.min(axis=0)
    surfaces = np.where(nearest == len(boxes), GROUND, nearest)
    surfaces = np.where(np.isinf(best), NOTHING, surfaces)
    return Hits(best.astype(np.float32), surfaces, _normals(boxes, directions, surfaces, axes))


def _enter(boxes: Boxes, origin: Floats, directions: Floats) -> tuple[Floats, Integers]:
    """Distance [B, R] at which each ray enters each box, inf where it does not, and through which axis."""
    starts = _turned((origin - boxes.centers).T, boxes.yaws)[..., None]
    steps = _turned(directions.T[:, None], boxes.yaws[:, None])
    steps[steps == 0] = _PARALLEL
    half = boxes.sizes.T[..., None] / 2
    reach, middle = np.abs(half / steps), -starts / steps
    enters = middle - reach
    entry, leave = enters.max(axis=0), (middle + reach).min(axis=0)
    return np.where((entry <= leave) & (entry > _NEAREST), entry, np.float32(np.inf)), enters.argmax(axis=0)


def _turned(vectors: Floats, yaws: Floats) -> Floats:
    """Vectors [3, ...] as boxes of these yaws see them."""
    cos, sin = np.cos(yaws), np.sin(yaws)
    x, y, z = vectors
    turned = (x * cos + y * sin, y * cos - x * sin)
    return np.stack([*turned, np.broadcast_to(z, turned[0].shape)])


def _normals(boxes: Boxes, directions: Floats, surfaces: Integers, axes: Integers) -> Floats:
    normals = np.zeros_like(directions)
    normals[:, 2] = 1
    rays = np.flatnonzero(surfaces >= 0)
    box = surfaces[rays]
    axis = axes[box, rays]
    yaws = boxes.yaws[box] + np.where(axis == 1, np.pi / 2, 0)
    outward = np.column_stack([np.cos(yaws), np.sin(yaws), np.zeros_like(yaws)])
    outward = np.where((axis == 2)[:, None], [0, 0, 1], outward)
    facing = -np.sign((outward * directions[rays]).sum(axis=1, keepdims=True))
    normals[rays] = outward * facing
    return normals
