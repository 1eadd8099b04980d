"""Cluttered scenes with several handwritten digits each: rendered here, with a box and a mask for every digit.

The digits are the real ones of ``digits``, and a scene of a split shows digits of that split alone. Everything
else is drawn: a textured background, strokes that are no digits, uneven contrast, noise. A scene is a pure
function of split, size, digit sizes, seed and index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from jetway.data.digits import Split, split_indices
from jetway.data.scene_augmentation import Augmentation, random_window, randomly_lit
from jetway.tasks.frames import FrameInput

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SPLIT_CODES: dict[Split, int] = {"train": 0, "calibration": 1, "evaluation": 2}
CLASSES = 10
#: Most digits of a scene.
MAX_DIGITS = 6
#: Least opacity of a pixel that belongs to a digit.
_INK = 0.35
#: Tries to find a free place for a digit before it is left out.
_TRIES = 12
#: Brightness in grey levels that becomes 0, and what becomes 1.
MEAN, DEVIATION = 128.0, 64.0


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like: ``size`` in pixels, ``digit_sizes`` the least and largest digit height as a share.

    Each scene's exposure is between ``min_exposure_ratio`` and 1, as often in each half of that range in stops; at
    1, the default, all are taken by day.
    """

    size: int = 96
    digit_sizes: tuple[float, float] = (0.16, 0.46)
    strokes: int = 6
    seed: int = 0
    min_exposure_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.min_exposure_ratio <= 1:
            raise ValueError(f"min_exposure_ratio is {self.min_exposure_ratio}, but goes from above 0 to 1")


@dataclass(frozen=True)
class Scene:
    """``image`` is [3, size, size]. ``boxes`` [n, 4] are x1, y1, x2, y2 in pixels, ``labels`` [n] the digits.

    ``mask`` [size, size] holds 0 for background and 1 + digit on a digit.
    """

    image: Bytes
    mask: Bytes
    boxes: Floats
    labels: NDArray[np.int64]


def render_scene(split: Split, config: SceneConfig, index: int) -> Scene:
    generator = np.random.default_rng([config.seed, SPLIT_CODES[split], index])
    canvas = _background(generator, config.size)
    for _ in range(generator.integers(config.strokes // 2, config.strokes + 1)):
        _draw_stroke(generator, canvas)
    mask = np.zeros((config.size, config.size), dtype=np.uint8)
    placed = _draw_digits(generator, canvas, mask, split, config)
    return Scene(
        image=_photographed(generator, canvas, config.min_exposure_ratio),
        mask=mask,
        boxes=np.array([box for box, _ in placed], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label in placed], dtype=np.int64),
    )


@lru_cache(maxsize=8)
def scenes(split: Split, config: SceneConfig, count: int) -> tuple[Scene, ...]:
    """The first scenes of a split, kept in memory as bytes."""
    return tuple(render_scene(split, config, index) for index in range(count))


def augmented(scene: Scene, augmentation: Augmentation) -> Scene:
    """The scene through a random window, in another light."""
    window = random_window(scene.image.shape[-1], augmentation)
    boxes, kept = window.boxes(scene.boxes)
    return Scene(
        image=randomly_lit(window.image(scene.image), augmentation),
        mask=window.mask(scene.mask),
        boxes=boxes[kept],
        labels=scene.labels[kept],
    )


class _Scenes:
    """Scenes by index, as they are or augmented anew each time."""

    def __init__(
        self, split: Split, config: SceneConfig, count: int, augmentation: Augmentation | None = None
    ) -> None:
        self.scenes, self.augmentation = scenes(split, config, count), augmentation

    def __len__(self) -> int:
        return len(self.scenes)

    def scene(self, index: int) -> Scene:
        scene = self.scenes[index]
        return augmented(scene, self.augmentation) if self.augmentation else scene


def image_input(size: int) -> FrameInput:
    """How a frame becomes the input of a network on scenes or crops of them."""
    return FrameInput(name="image", size=(size, size), mean=(MEAN,) * 3, deviation=(DEVIATION,) * 3)


def normalized(image: Bytes) -> Tensor:
    """Bytes [3, H, W] as the float32 that networks take."""
    return (torch.from_numpy(image).float() - MEAN) / DEVIATION


class DetectionScenes(_Scenes, Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """Images with ``boxes`` [MAX_DIGITS, 4] in pixels and ``labels`` [MAX_DIGITS], filled up with -1."""

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scene = self.scene(index)
        boxes, labels = torch.full((MAX_DIGITS, 4), -1.0), torch.full((MAX_DIGITS,), -1)
        boxes[: len(scene.boxes)] = torch.from_numpy(scene.boxes)
        labels[: len(scene.labels)] = torch.from_numpy(scene.labels)
        return {"image": normalized(scene.image)}, {"boxes": boxes, "labels": labels}


class SegmentationScenes(_Scenes, Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Images with their mask, int64 [size, size]."""

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        scene = self.scene(index)
        return {"image": normalized(scene.image)}, torch.from_numpy(scene.mask).long()


class DigitCrops(Dataset[tuple[dict[str, Tensor], int]]):
    """Every digit of the scenes cut out with some of what surrounds it, scaled to ``crop_size`` pixels."""

    #: Side of the crop as a multiple of the box's longer side, and how far its centre is off, as a share.
    MARGIN, JITTER = 1.35, 0.1

    def __init__(
        self,
        split: Split,
        config: SceneConfig,
        count: int,
        crop_size: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images, self.labels = digit_crops(split, config, count, crop_size)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        image = self.images[index].numpy()
        if self.augmentation:
            window = random_window(image.shape[-1], self.augmentation)
            image = randomly_lit(window.image(image), self.augmentation)
        return {"image": normalized(image)}, int(self.labels[index])


@lru_cache(maxsize=8)
def digit_crops(
    split: Split, config: SceneConfig, count: int, crop_size: int
) -> tuple[Tensor, NDArray[np.int64]]:
    """Crops [n, 3, crop_size, crop_size] as bytes, and the digit in the middle of each."""
    crops, labels = [], []
    for index, scene in enumerate(scenes(split, config, count)):
        generator = np.random.default_rng([config.seed, SPLIT_CODES[split], index, crop_size])
        for box in scene.boxes:
            offset = generator.uniform(-DigitCrops.JITTER, DigitCrops.JITTER, 2)
            crops.append(_crop(scene.image, box, offset, crop_size))
        labels.append(scene.labels)
    return torch.stack(crops), np.concatenate(labels)


def _crop(image: Bytes, box: Floats, offset: NDArray[np.float64], crop_size: int) -> Tensor:
    side = float(max(box[2] - box[0], box[3] - box[1])) * DigitCrops.MARGIN
    size = image.shape[-1]
    centre = (box[:2] + box[2:]) / 2 + offset * side
    x, y = (2 * centre / size - 1).tolist()
    matrix = torch.tensor([[[side / size, 0, x], [0, side / size, y]]])
    grid = functional.affine_grid(matrix, [1, 3, crop_size, crop_size], align_corners=False)
    pixels = torch.from_numpy(image)[None].float()
    cut = functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    return cut[0].round().clamp(0, 255).byte()


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Floats, NDArray[np.int64], dict[Split, NDArray[np.int64]]]:
    from sklearn.datasets import load_digits  # takes a second, which a run that reuses everything saves

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 16).astype(np.float32), labels, split_indices(labels)


def _background(generator: np.random.Generator, size: int) -> Floats:
    """Patches of colour with a wave across them, [3, size, size] from 0 to 1."""
    patches = generator.uniform(0.15, 0.85, (3, *generator.integers(2, 9, 2))).astype(np.float32)
    canvas = 0.5 + generator.uniform(0.3, 1.0) * (_scaled(patches, size, size) - 0.5)
    angle, period, phase = generator.uniform([0, 5, 0], [np.pi, 30, 2 * np.pi])
    x, y = _pixels(size)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period) + phase)
    return np.asarray(canvas + generator.uniform(0, 0.12) * wave, dtype=np.float32)


def _draw_stroke(generator: np.random.Generator, canvas: Floats) -> None:
    """A straight line or an arc, as wide as the lines of digits."""
    size = canvas.shape[-1]
    x, y = _pixels(size)
    centre, width = generator.uniform(0, size, 2), generator.uniform(0.012, 0.03) * size
    angle, reach = generator.uniform(0, 2 * np.pi), generator.uniform(0.06, 0.22) * size
    dx, dy = x - centre[0], y - centre[1]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if generator.random() < 0.5:
        distance = np.hypot(np.maximum(np.abs(along) - reach, 0), across)
    else:
        distance = np.where(along > -0.3 * reach, np.abs(np.hypot(dx, dy) - reach), np.float32(size))
    _paint(generator, canvas, np.clip(width - distance + 0.5, 0, 1))


def _draw_digits(
    generator: np.random.Generator, canvas: Floats, mask: Bytes, split: Split, config: SceneConfig
) -> list[tuple[list[int], int]]:
    images, labels, splits = _all_digits()
    placed: list[tuple[list[int], int]] = []
    for index in generator.choice(splits[split], generator.integers(2, MAX_DIGITS + 1), replace=False):
        ink = _digit(generator, images[index], config)
        corner = _free_corner(generator, ink.shape, [box for box, _ in placed], config.size)
        if corner is None:
            continue
        x, y = corner
        window = (slice(y, y + ink.shape[0]), slice(x, x + ink.shape[1]))
        _paint(generator, canvas[:, window[0], window[1]], ink)
        mask[window][ink > _INK] = 1 + labels[index]
        placed.append((_box(ink, x, y), int(labels[index])))
    return placed


def _digit(generator: np.random.Generator, image: Floats, config: SceneConfig) -> Floats:
    """Opacity [height, width] of a digit, scaled to a size of its own."""
    low, high = np.log(np.array(config.digit_sizes) * config.size)
    height = np.exp(generator.uniform(low, high))
    columns = np.flatnonzero(image.max(axis=0) > 0.1)
    inked = image[None, :, columns[0] : columns[-1] + 1]
    width = height * inked.shape[2] / image.shape[0] * generator.uniform(1.0, 1.4)
    ink = _scaled(inked, round(height), round(width))[0]
    return np.asarray(np.clip(1.3 * ink - 0.15, 0, 1))


def _free_corner(
    generator: np.random.Generator, shape: tuple[int, ...], boxes: list[list[int]], size: int
) -> tuple[int, int] | None:
    """Left and top of a place where the digit covers none that is there; None when none was found."""
    height, width = shape
    for _ in range(_TRIES):
        x, y = (int(value) for value in generator.integers(0, [size - width + 1, size - height + 1]))
        if all(x >= b[2] or y >= b[3] or x + width <= b[0] or y + height <= b[1] for b in boxes):
            return x, y
    return None


def _box(ink: Floats, x: int, y: int) -> list[int]:
    """The tightest box around what is opaque."""
    rows, columns = np.flatnonzero((ink > _INK).any(axis=1)), np.flatnonzero((ink > _INK).any(axis=0))
    return [x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1]


def _paint(generator: np.random.Generator, canvas: Floats, opacity: NDArray[np.floating]) -> None:
    """Paints in a colour that differs from what is below by a contrast of its own, lighter or darker."""
    below = float(canvas.mean())
    contrast = generator.uniform(0.25, 0.6) * (1 if generator.random() < 0.5 + (0.5 - below) else -1)
    colour = np.clip(below + contrast + generator.uniform(-0.15, 0.15, 3), 0, 1)
    canvas += (opacity * (colour[:, None, None] - canvas)).astype(np.float32)


def _photographed(generator: np.random.Generator, canvas: Floats, min_exposure_ratio: float) -> Bytes:
    """The canvas under uneven light, with noise, exposed for less than it needs."""
    size = canvas.shape[-1]
    light = _scaled(generator.uniform(0.75, 1.2, (1, 2, 2)).astype(np.float32), size, size)
    noise = generator.standard_normal(canvas.shape, dtype=np.float32) * generator.uniform(0.01, 0.05)
    exposure = np.float32(min_exposure_ratio ** generator.random())
    return np.asarray(np.clip((canvas * light + noise) * exposure * 255, 0, 255), dtype=np.uint8)


def _scaled(images: Floats, height: int, width: int) -> Floats:
    """Images [n, h, w] scaled bilinearly."""
    return np.asarray(_weights(images.shape[1], height) @ images @ _weights(images.shape[2], width).T)


@lru_cache(maxsize=1024)
def _weights(source: int, wanted: int) -> Floats:
    """The matrix [wanted, source] that interpolates linearly, pixel centres aligned."""
    places = np.clip((np.arange(wanted) + 0.5) * source / wanted - 0.5, 0, source - 1)
    weights = np.clip(1 - np.abs(places[:, None] - np.arange(source)), 0, None)
    return np.asarray(weights, dtype=np.float32)


@lru_cache(maxsize=8)
def _pixels(size: int) -> tuple[Floats, Floats]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return x, y
