import numpy as np
import pytest
import torch

from jetway.configs.schema import WorkloadConfig
from jetway.data import scenes as scenes_module
from jetway.data.scene_augmentation import Augmentation, Window, randomly_lit
from jetway.data.scenes import (
    MAX_DIGITS,
    DetectionScenes,
    DigitCrops,
    SceneConfig,
    SegmentationScenes,
    augmented,
    render_scene,
)
from jetway.tasks.errors import ConfigError
from jetway.tasks.workload import load_workload
from jetway.tasks.workloads.detector import SceneDetector
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier
from jetway.tasks.workloads.segmenter import SceneSegmenter

CONFIG = SceneConfig(size=64)


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_scene_is_a_function_of_seed_split_and_index():
    scene = render_scene("train", CONFIG, 3)
    render_scene("train", CONFIG, 4)
    assert same(scene, render_scene("train", CONFIG, 3))
    others = [("train", CONFIG, 4), ("evaluation", CONFIG, 3), ("train", SceneConfig(size=64, seed=1), 3)]
    assert not any(same(scene, render_scene(*other)) for other in others)


def test_scenes_in_low_light_differ_in_exposure_alone():
    dark = SceneConfig(size=64, min_exposure_ratio=0.1)
    pairs = [
        (render_scene("train", CONFIG, index), render_scene("train", dark, index)) for index in range(40)
    ]
    ratios = [float(low.image.mean() / day.image.mean()) for day, low in pairs]
    assert all(0.09 < ratio < 1.01 for ratio in ratios)
    assert sum(ratio < 0.1**0.5 for ratio in ratios) == pytest.approx(20, abs=8)
    assert all(np.array_equal(day.mask, low.mask) for day, low in pairs)
    assert all(np.corrcoef(day.image.ravel(), low.image.ravel())[0, 1] > 0.9 for day, low in pairs)


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


STRONG = Augmentation(crop_ratio=0.4, light_ratio=0.3)


@pytest.mark.parametrize("index", range(10))
def test_an_augmented_scene_is_labelled_as_it_looks(index):
    """A digit that is wholly seen fills its box in the mask, to a pixel at each side."""
    torch.manual_seed(index)
    scene = render_scene("train", CONFIG, index)
    seen = augmented(scene, STRONG)
    assert seen.image.shape == scene.image.shape
    assert set(seen.labels) <= set(scene.labels)
    assert set(np.unique(seen.mask)) <= set(np.unique(scene.mask))
    for box, label in zip(seen.boxes, seen.labels, strict=True):
        x1, y1, x2, y2 = box.round().astype(int)
        rows, columns = np.nonzero(seen.mask[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] == 1 + label)
        assert np.ptp(rows) + 1 == pytest.approx(y2 - y1, abs=2)
        assert np.ptp(columns) + 1 == pytest.approx(x2 - x1, abs=2)


def test_a_window_moves_pixels_and_boxes_alike_and_drops_what_is_out_of_sight():
    window = Window(x=16, y=8, side=32, size=64)
    boxes = np.array([[20, 10, 30, 40], [0, 0, 10, 10], [12, 8, 20, 16], [10, 8, 20, 16]], np.float32)
    image = np.zeros((3, 64, 64), np.uint8)
    image[:, 10:40, 20:30] = 255
    seen, kept = window.boxes(boxes)
    assert kept.tolist() == [True, False, True, False]
    assert seen[0].tolist() == [8, 4, 28, 64]
    bright = np.argwhere(window.image(image)[0] > 128)
    assert [*bright.min(axis=0), *(bright.max(axis=0) + 1)] == [4, 8, 64, 28]


def test_augmentation_is_drawn_by_seed_and_anew_each_time():
    data = DetectionScenes("train", CONFIG, 2, STRONG)
    torch.manual_seed(3)
    first, second = data[0], data[0]
    torch.manual_seed(3)
    assert torch.equal(first[0]["image"], data[0][0]["image"])
    assert not torch.equal(first[0]["image"], second[0]["image"])


def test_light_changes_nothing_but_values():
    image = render_scene("train", CONFIG, 0).image
    torch.manual_seed(0)
    lit = [randomly_lit(image, STRONG) for _ in range(20)]
    assert np.ptp([float(one.mean()) for one in lit]) > 20
    assert min(np.corrcoef(image.ravel(), one.ravel())[0, 1] for one in lit) > 0.95


WORKLOADS = {
    "detector": lambda **options: SceneDetector(size=32, scenes=(8, 2, 2), **options),
    "segmenter": lambda **options: SceneSegmenter(size=32, scenes=(8, 2, 2), **options),
    "mobilenet_v3": lambda **options: CropClassifier(size=32, scenes=(8, 2, 2), **options),
}


def images(data):
    return torch.stack([data[index][0]["image"] for index in range(len(data))])


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_scenes_are_augmented_in_training_when_asked_and_less_in_qat(workload):
    plain = images(workload().train_data())
    state = torch.get_rng_state()
    assert torch.equal(plain, images(workload().qat_data()))
    assert torch.equal(state, torch.get_rng_state()), "without augmentation nothing is drawn"

    strong = workload(augmentation=1.0)
    distances = [
        float((images(data()) - plain).abs().mean()) for data in (strong.train_data, strong.qat_data)
    ]
    assert 0 < distances[1] < 0.7 * distances[0]
    assert torch.equal(images(workload(augmentation=1.0, qat_augmentation=0.0).qat_data()), plain)
    untouched = [images(data()) for data in (strong.evaluation_data, workload().evaluation_data)]
    assert torch.equal(*untouched)


@pytest.mark.parametrize("options", [{"augmentation": 1.5}, {"augmentation": 0.2, "qat_augmentation": 0.3}])
def test_qat_is_never_augmented_more_than_training(options):
    config = WorkloadConfig(class_path="jetway.tasks.workloads.detector:SceneDetector", options=options)
    with pytest.raises(ConfigError, match="from 0 to 1, and QAT's is the weaker one"):
        load_workload(config)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_all_splits_are_as_dark_as_asked(workload):
    day, dark = workload(), workload(min_exposure_ratio=0.05)
    for data in ("train_data", "calibration_data", "evaluation_data"):
        assert images(getattr(dark, data)()).mean() < images(getattr(day, data)()).mean() - 0.2


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_an_exposure_that_cannot_be_is_refused(ratio):
    config = WorkloadConfig(
        class_path="jetway.tasks.workloads.detector:SceneDetector", options={"min_exposure_ratio": ratio}
    )
    with pytest.raises(ConfigError, match=r"min_exposure_ratio is .+ but goes from above 0 to 1"):
        load_workload(config)
