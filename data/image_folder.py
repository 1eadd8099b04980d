"""Images on disk: a folder for each split, and in it a folder for each class, or images beside their masks.

DATA/train/cat/one.jpg            classification: the folders of a split are its classes, in their order
DATA/train/images/one.jpg         segmentation: a mask of the same name holds the class of each pixel
DATA/train/masks/one.png
DATA/train/images/one.jpg         detection: a line an object, its class, and the middle and the size of its box
DATA/train/labels/one.txt         as shares of the image, as YOLO's tools write them; none where nothing is shown
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from jetway.data.boxes import Floats, seen_boxes
from jetway.tasks.errors import WorkloadError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: Mean and deviation of ImageNet's channels, which most published weights expect.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The value of a mask's pixels that belong to no class.
IGNORED = 255


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input: scaled so that its shorter side fits, cropped in the middle, normalized.

    With ``padding``, a grey level, its whole is kept instead, in the middle of a square.
    """

    size: int
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION
    padding: int | None = None

    def image(self, path: Path, crop: Crop) -> Tensor:
        """float32 [3, size, size]."""
        pixels = np.asarray(self._cropped(_opened(path, "RGB"), crop, Image.Resampling.BILINEAR), np.float32)
        scaled = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        shape = (-1, 1, 1)
        return (scaled - torch.tensor(self.mean).view(shape)) / torch.tensor(self.deviation).view(shape)

    def mask(self, path: Path, crop: Crop) -> Tensor:
        """int64 [size, size], cropped as its image is."""
        cropped = self._cropped(_opened(path, None), crop, Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(cropped).astype(np.int64))

    def boxes(self, boxes: Floats, source: tuple[int, int], crop: Crop) -> tuple[Floats, NDArray[np.bool_]]:
        """Boxes [n, 4], given as shares of an image of ``source`` pixels, cropped as it is, and which are seen."""
        side, margins = _square(source)
        x1, y1, x2, _ = crop.box((side, side))
        pixels = boxes * np.array([*source, *source], np.float32)
        seen, kept = seen_boxes(pixels, (x1 - margins[0], y1 - margins[1]), self.size / (x2 - x1), self.size)
        return (self._mirrored(seen) if crop.is_flipped else seen), kept

    def _mirrored(self, boxes: Floats) -> Floats:
        return np.column_stack([self.size - boxes[:, 2], boxes[:, 1], self.size - boxes[:, 0], boxes[:, 3]])

    def _squared(self, image: Image.Image) -> Image.Image:
        if self.padding is None:
            return image
        side, margins = _square(image.size)
        canvas = Image.new(image.mode, (side, side), (self.padding,) * len(image.getbands()))
        canvas.paste(image, margins)
        return canvas

    def _cropped(self, image: Image.Image, crop: Crop, resampling: Image.Resampling) -> Image.Image:
        image = self._squared(image)
        cropped = image.resize((self.size, self.size), resampling, box=crop.box(image.size))
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.is_flipped else cropped


@dataclass(frozen=True)
class Crop:
    """A square of an image: its side as a share of the shorter side, and where it lies in what is left (0 to 1)."""

    share: float = 1.0
    left: float = 0.5
    top: float = 0.5
    is_flipped: bool = False

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        side = min(size) * self.share
        x, y = (size[0] - side) * self.left, (size[1] - side) * self.top
        return x, y, x + side, y + side


def random_crop(smallest_share: float) -> Crop:
    """Drawn from torch's global generator."""
    share, left, top, flip = torch.rand(4).tolist()
    return Crop(smallest_share + (1 - smallest_share) * share, left, top, flip < 0.5)


class ClassifiedImages(Dataset[tuple[dict[str, Tensor], int]]):
    """One split for classification, labelled by place in ``classes``.

    ``smallest_crop`` below 1 crops and flips at random, as training wants it.
    """

    def __init__(
        self, folder: Path, classes: Sequence[str], preparation: Preparation, *, smallest_crop: float = 1.0
    ) -> None:
        found = class_names(folder)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise WorkloadError(
                f"{folder}: {unknown} are no classes of the training images, which are {list(classes)}. "
                "Rename or remove these folders."
            )
        self.paths = [(path, classes.index(name)) for name in found for path in image_paths(folder / name)]
        self.preparation, self.smallest_crop = preparation, smallest_crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        path, label = self.paths[index]
        return {"image": self.preparation.image(path, _crop(self.smallest_crop))}, label


class SegmentedImages(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """One split for segmentation; masks are single-channel images whose values are class indices."""

    def __init__(self, folder: Path, preparation: Preparation, *, smallest_crop: float = 1.0) -> None:
        masks = {path.stem: path for path in image_paths(folder / "masks")}
        images = image_paths(folder / "images")
        missing = [path.name for path in images if path.stem not in masks]
        if missing:
            raise WorkloadError(
                f"{folder}: {len(missing)} images have no mask of their name, such as {missing[0]}. "
                "Put one into masks/, or take the image out."
            )
        self.pairs = [(path, masks[path.stem]) for path in images]
        self.preparation, self.smallest_crop = preparation, smallest_crop

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        image, mask = self.pairs[index]
        crop = _crop(self.smallest_crop)
        return {"image": self.preparation.image(image, crop)}, self.preparation.mask(mask, crop)


class BoxedImages(Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """One split for detection: ``boxes`` [most, 4] in pixels of the input and ``labels`` [most], filled up with -1."""

    def __init__(
        self, folder: Path, classes: int, preparation: Preparation, *, smallest_crop: float = 1.0
    ) -> None:
        assert preparation.padding is not None, "boxes are counted from a padded image's corner"
        self.images = image_paths(folder / "images")
        self.objects = [_objects(folder / "labels" / f"{path.stem}.txt", classes) for path in self.images]
        self.most = max(1, *(len(objects) for objects in self.objects))
        self.preparation, self.smallest_crop = preparation, smallest_crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        path, objects, crop = self.images[index], self.objects[index], _crop(self.smallest_crop)
        with Image.open(path) as image:
            seen, kept = self.preparation.boxes(_corners(objects[:, 1:]), image.size, crop)
        boxes, labels = torch.full((self.most, 4), -1.0), torch.full((self.most,), -1)
        boxes[: kept.sum()] = torch.from_numpy(seen[kept])
        labels[: kept.sum()] = torch.from_numpy(objects[kept, 0])
        return {"image": self.preparation.image(path, crop)}, {"boxes": boxes, "labels": labels}


def class_names(folder: Path) -> tuple[str, ...]:
    """Folders of a split, in their order. Raises WorkloadError when there is none."""
    names = tuple(sorted(entry.name for entry in _entries(folder) if entry.is_dir()))
    if not names:
        raise WorkloadError(f"{folder} has no folders. Put each class's images into a folder of its name.")
    return names


def image_paths(folder: Path) -> list[Path]:
    """Images of a folder by name. Raises WorkloadError when there is none."""
    paths = sorted(path for path in _entries(folder) if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise WorkloadError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}).")
    return paths


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise WorkloadError(f"There is no folder {folder}. Correct workload.options.data, or make it.")
    return list(folder.iterdir())


def _objects(path: Path, classes: int) -> Floats:
    """Class, and middle and size of the box, of each line; none without a file. Raises WorkloadError."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
    for number, fields in enumerate(lines, 1):
        if len(fields) != 5 or not fields[0].isdigit() or int(fields[0]) >= classes:
            raise WorkloadError(
                f"{path}:{number}: {' '.join(fields)!r} is no object. Write its class, from 0 to {classes - 1}, and "
                "the middle's x and y and the width and height of its box, as shares of the image."
            )
    return np.array(lines, dtype=np.float32).reshape(-1, 5)


def _corners(boxes: Floats) -> Floats:
    """x1, y1, x2, y2 of boxes [n, 4] by middle and size."""
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def _square(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Side of the square that holds an image, and what is left of it and above."""
    side = max(size)
    return side, ((side - size[0]) // 2, (side - size[1]) // 2)


def _crop(smallest_share: float) -> Crop:
    return random_crop(smallest_share) if smallest_share < 1 else Crop()


def _opened(path: Path, mode: str | None) -> Image.Image:
    try:
        image: Any = Image.open(path)
        image.load()
    except (
        OSError,
        ImportError,
    ) as exc:  # ultralytics' own Image.open imports decoders for what it does not know
        raise WorkloadError(f"{path} is no readable image: {exc}. Replace it, or take it out.") from exc
    converted: Image.Image = image.convert(mode) if mode else image
    return converted
