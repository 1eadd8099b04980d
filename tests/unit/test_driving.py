"""The procedural world: cameras, LiDAR and targets tell of the same things."""

import numpy as np
import pytest
import torch

from jetway.data.driving.frames import (
    Augmentation,
    DrivingFrames,
    Grid,
    fill_pillars,
    frame_seed,
    make_frame,
    mirrored,
)
from jetway.data.driving.rays import GROUND, NOTHING, cast_rays
from jetway.data.driving.sensors import LIDAR_POSITION, Rig, scan, take_images
from jetway.data.driving.world import GROUNDS, OBJECTS, Boxes, Road, Scene, make_scene

RIG, GRID = Rig(), Grid()
LARGEST_NOISE_M = 0.2  # the range's noise is 0.03 m
MAGENTA = (1.0, 0.0, 1.0)


def boxes_at(*rows, color=MAGENTA):
    """Boxes from rows of kind, x, y, length, width, height and yaw."""
    table = np.array(rows, dtype=np.float32).reshape(-1, 7)
    kinds = table[:, 0].astype(np.int64)
    centers = np.column_stack([table[:, 1:3], table[:, 5] / 2])
    colors = np.tile(np.array(color, dtype=np.float32), (len(table), 1))
    return Boxes(kinds, centers, table[:, 3:6], table[:, 6], colors)


def scene_of(boxes):
    return Scene((Road(0.0, 0.0, 5.0, 8.0),), boxes, np.ones(3, dtype=np.float32))


def magenta_extent(image):
    """First and last column and row of what is magenta in an image [3, height, width]."""
    red, green, blue = image.astype(int)
    rows, columns = np.nonzero((red - green > 100) & (blue - green > 100))
    return np.array([columns.min(), columns.max() + 1, rows.min(), rows.max() + 1])


def projected_extent(camera, boxes):
    pixels = camera.project(boxes.corners()[0])
    assert (pixels[:, 2] > 0).all()
    return np.array([pixels[:, 0].min(), pixels[:, 0].max(), pixels[:, 1].min(), pixels[:, 1].max()])


@pytest.mark.parametrize(
    ("camera", "x", "y", "yaw"), [(0, 7, 1, 0.4), (1, -1, 8, 1.0), (2, -7, -2, 2.5), (3, 0.5, -6, 0.0)]
)
def test_a_box_is_drawn_where_its_corners_project(camera, x, y, yaw):
    boxes = boxes_at((0, x, y, 3.0, 1.6, 1.5, yaw))
    images = take_images(scene_of(boxes), RIG, np.random.default_rng(0))
    expected = projected_extent(RIG.ring()[camera], boxes)
    assert np.abs(magenta_extent(images[camera]) - expected).max() <= 1.0


def test_lidar_points_lie_on_what_they_hit():
    scene = make_scene(np.random.default_rng(3), GRID.extent_m)
    points, surfaces = scan(scene, RIG, np.random.default_rng(4))
    assert np.abs(points[surfaces == GROUND, 2]).max() < LARGEST_NOISE_M
    assert len(np.unique(surfaces[surfaces >= 0])) >= 3
    for index in np.unique(surfaces[surfaces >= 0]):
        offset = points[surfaces == index, :3] - scene.boxes.centers[index]
        cos, sin = np.cos(scene.boxes.yaws[index]), np.sin(scene.boxes.yaws[index])
        local = np.column_stack(
            [offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]]
        )
        outside = np.abs(local) - scene.boxes.sizes[index] / 2
        assert np.abs(outside.max(axis=1)).max() < LARGEST_NOISE_M


def test_what_stands_behind_something_is_neither_hit_nor_seen():
    hidden, wall = (0, 9, 0, 2.0, 1.5, 1.0, 0), (1, 5, 0, 1.0, 8.0, 3.0, 0)
    both = boxes_at(hidden, wall)
    both.colors[1] = (0.2, 0.8, 0.2)
    _, surfaces = scan(scene_of(both), RIG, np.random.default_rng(0))
    assert (surfaces == 1).sum() > 100
    assert (surfaces == 0).sum() == 0
    image = take_images(scene_of(both), RIG, np.random.default_rng(0))[0].astype(int)
    assert not ((image[0] - image[1] > 100) & (image[2] - image[1] > 100)).any()


def test_rays_meet_the_nearest_surface_at_its_distance_with_its_normal():
    boxes = boxes_at((0, 10, 0, 4.0, 2.0, 4.0, 0), (0, 0, 10, 4.0, 2.0, 4.0, np.pi / 2))
    directions = np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1], [-1, 0, 0]], dtype=np.float32)
    hits = cast_rays(boxes, LIDAR_POSITION, directions)
    assert hits.surfaces.tolist() == [0, 1, GROUND, NOTHING, NOTHING]
    assert np.allclose(hits.distances, [8, 8, LIDAR_POSITION[2], np.inf, np.inf], atol=1e-5)
    assert np.allclose(hits.normals[:3], [[-1, 0, 0], [0, -1, 0], [0, 0, 1]], atol=1e-6)


def test_a_scene_without_boxes_is_ground_and_sky():
    nothing = boxes_at()
    points, surfaces = scan(scene_of(nothing), RIG, np.random.default_rng(0))
    assert set(surfaces.tolist()) == {GROUND}
    assert len(points) > 1000


def test_frames_are_the_same_again_and_no_two_splits_share_one():
    first, again = (make_frame.__wrapped__("train", 5, RIG, GRID) for _ in range(2))
    assert first is not again
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.pillars, again.pillars)
    assert np.array_equal(first.objects, again.objects)
    assert not np.array_equal(first.images, make_frame("evaluation", 5, RIG, GRID).images)
    states = {
        tuple(frame_seed(split, index).generate_state(4))
        for split in ("train", "calibration", "evaluation")
        for index in range(50)
    }
    assert len(states) == 150


def test_pillars_hold_the_points_that_fall_into_them():
    points = np.random.default_rng(0).uniform(-15, 15, size=(1500, 4)).astype(np.float32)
    filled = fill_pillars(points, GRID).astype(np.float32)
    _, rank, row, column = np.nonzero(filled[4:5])
    dx, dy, z, intensity, _ = filled[:, rank, row, column]
    restored = np.column_stack([row + 0.5 + dx, column + 0.5 + dy]) * GRID.pillar_m - GRID.extent_m
    inside = points[(np.abs(points[:, :2]) < GRID.extent_m).all(axis=1)]
    held = np.column_stack([restored, z, intensity])
    distances = np.abs(held[:, None] - inside[None]).max(axis=2).min(axis=1)
    assert distances.max() < 0.01
    counts = np.zeros((GRID.pillars, GRID.pillars))
    np.add.at(counts, tuple(((inside[:, :2] + GRID.extent_m) / GRID.pillar_m).astype(int).T), 1)
    assert np.array_equal(filled[4].sum(axis=0), np.minimum(counts, GRID.points_per_pillar))


def test_targets_name_objects_that_lidar_hits_where_they_stand():
    frame = make_frame("train", 0, RIG, GRID)
    objects = frame.objects[frame.objects[:, 0] >= 0]
    assert len(objects) >= 2
    assert (frame.heatmap == 1).sum() == len(objects)
    for kind, x, y in objects:
        place = (np.array([x, y]) + GRID.extent_m) / GRID.cell_m
        row, column = place.astype(int)
        assert frame.heatmap[int(kind), row, column] == 1
        assert np.allclose(frame.boxes[:2, row, column], place % 1 - 0.5, atol=1e-4)


def test_every_class_occurs():
    frames = [make_frame("calibration", index, RIG, GRID) for index in range(12)]
    kinds = {int(kind) for frame in frames for kind in frame.objects[:, 0] if kind >= 0}
    grounds = set(np.unique([frame.segmentation for frame in frames]).tolist())
    assert kinds == set(range(len(OBJECTS)))
    assert grounds == set(range(len(GROUNDS)))


@pytest.mark.parametrize(("camera", "opposite", "x", "y"), [(0, 0, 7, 2), (1, 3, 1, 8)])
def test_mirrored_images_show_the_mirrored_world(camera, opposite, x, y):
    images = torch.from_numpy(
        take_images(scene_of(boxes_at((0, x, y, 3.0, 1.6, 1.5, 0.5))), RIG, np.random.default_rng(0))
    )
    inputs, target = DrivingFrames("train", 1, RIG, GRID)[0]
    flipped, _ = mirrored(inputs | {"images": images}, target)
    there = boxes_at((0, x, -y, 3.0, 1.6, 1.5, -0.5))
    expected = projected_extent(RIG.ring()[opposite], there)
    assert np.abs(magenta_extent(flipped["images"][opposite].numpy()) - expected).max() <= 1.0


def test_mirrored_targets_and_pillars_agree_with_each_other():
    inputs, target = DrivingFrames("train", 1, RIG, GRID)[0]
    flipped, moved = mirrored(inputs, target)
    kind, x, y = moved["objects"][0].tolist()
    place = (torch.tensor([x, y]) + GRID.extent_m) / GRID.cell_m
    row, column = place.int().tolist()
    assert moved["heatmap"][int(kind), row, column] == 1
    assert torch.allclose(moved["boxes"][:2, row, column], place % 1 - 0.5, atol=1e-4)
    back, home = mirrored(flipped, moved)
    assert all(torch.equal(back[name], inputs[name]) for name in inputs)
    assert all(torch.equal(home[name], target[name]) for name in target)


def test_augmentation_changes_light_by_seed():
    data = DrivingFrames("train", 1, RIG, GRID, Augmentation(brightness_ratio=0.3, mirror=True))
    torch.manual_seed(1)
    first = data[0][0]["images"]
    torch.manual_seed(1)
    assert torch.equal(first, data[0][0]["images"])
    assert not torch.equal(first, data[0][0]["images"])
