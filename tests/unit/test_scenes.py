import numpy as np
import pytest
import torch

from jetway.data import scenes as scenes_module
from jetway.data.scenes import (
    MAX_DIGITS,
    DetectionScenes,
    DigitCrops,
    SceneConfig,
    SegmentationScenes,
    render_scene,
)

CONFIG = SceneConfig(size=64)


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_scene_is_a_function_of_seed_split_and_index():
    scene = render_scene("train", CONFIG, 3)
    render_scene("train", CONFIG, 4)
    assert same(scene, render_scene("train", CONFIG, 3))
    others = [("train", CONFIG, 4), ("evaluation", CONFIG, 3), ("train", SceneConfig(size=64, seed=1), 3)]
    assert not any(same(scene, render_scene(*other)) for other in others)


def test_splits_never_show_the_same_digit(monkeypatch):
    used = {split: set() for split in ("train", "calibration", "evaluation")}
    images, _, _ = scenes_module._all_digits()
    addresses = {images[index].ctypes.data: index for index in range(len(images))}
    drawn = scenes_module._digit

    def watched(generator, image, config):
        used[split].add(addresses[image.ctypes.data])
        return drawn(generator, image, config)

    monkeypatch.setattr(scenes_module, "_digit", watched)
    for split in used:
        for index in range(60):
            render_scene(split, CONFIG, index)
    assert all(len(seen) > 50 for seen in used.values())
    assert not (used["train"] & used["evaluation"]) | (used["train"] & used["calibration"])
    assert not used["calibration"] & used["evaluation"]


@pytest.mark.parametrize("index", range(20))
def test_boxes_and_masks_say_the_same(index):
    scene = render_scene("train", CONFIG, index)
    assert 1 <= len(scene.boxes) == len(scene.labels) <= MAX_DIGITS
    left = scene.mask.copy()
    for (x1, y1, x2, y2), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
        digit = scene.mask[y1:y2, x1:x2] == 1 + label
        assert digit[0].any()
        assert digit[-1].any()
        assert digit[:, 0].any()
        assert digit[:, -1].any()
        left[y1:y2, x1:x2] = 0
    assert not left.any()


def test_digits_come_in_several_sizes():
    heights = [h for i in range(50) for h in np.diff(render_scene("train", CONFIG, i).boxes[:, 1::2])[:, 0]]
    assert max(heights) > 2 * min(heights)


def test_detection_samples_are_padded_and_standardised():
    data = DetectionScenes("calibration", CONFIG, 20)
    inputs, target = data[0]
    count = int((target["labels"] >= 0).sum())
    assert (target["boxes"][count:] == -1).all()
    images = torch.stack([data[i][0]["image"] for i in range(20)])
    assert images.shape[1:] == (3, 64, 64)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.4
    assert 0.4 < float(images.std()) < 1.5
    assert inputs["image"].shape == (3, 64, 64)


def test_masks_are_classes():
    _, mask = SegmentationScenes("calibration", CONFIG, 4)[0]
    assert mask.dtype == torch.int64
    assert 0 == int(mask.min()) < int(mask.max()) <= 10


def test_crops_show_every_digit_once():
    crops = DigitCrops("calibration", CONFIG, 6, 32)
    labels = np.concatenate([render_scene("calibration", CONFIG, i).labels for i in range(6)])
    assert [crops[i][1] for i in range(len(crops))] == labels.tolist()
    assert crops[0][0]["image"].shape == (3, 32, 32)
    again = scenes_module.digit_crops.__wrapped__("calibration", CONFIG, 6, 32)
    assert torch.equal(crops.images, again[0])
