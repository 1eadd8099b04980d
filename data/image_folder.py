"""Images on disk: a folder for each split, and in it a folder for each class, or images beside their masks.

DATA/train/cat/one.jpg            classification: the folders of a split are its classes, in their order
DATA/train/images/one.jpg         segmentation: a mask of the same name holds the class of each pixel
DATA/train/masks/one.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from jetway.tasks.errors import WorkloadError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: Mean and deviation of ImageNet's channels, which most published weights expect.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The value of a mask's pixels that belong to no class.
IGNORED = 255


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input: scaled so that its shorter side fits, cropped in the middle, normalized."""

    size: int
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION

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

    def _cropped(self, image: Image.Image, crop: Crop, resampling: Image.Resampling) -> Image.Image:
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


def _crop(smallest_share: float) -> Crop:
    return random_crop(smallest_share) if smallest_share < 1 else Crop()


def _opened(path: Path, mode: str | None) -> Image.Image:
    try:
        image: Any = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as exc:
        raise WorkloadError(f"{path} is no readable image: {exc}. Replace it, or take it out.") from exc
    converted: Image.Image = image.convert(mode) if mode else image
    return converted
