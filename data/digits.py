"""The 1,797 real handwritten digits that scikit-learn ships, split once and for all.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

Split = Literal["train", "calibration", "evaluation"]
# Of every digit's images, in a fixed shuffled order: first the evaluation's, then the calibration's, then the rest.
EVALUATION_SHARE, CALIBRATION_SHARE = 1 / 3, 1 / 12
SPLIT_SEED = 1998
#: Of the pixels of all images, where ink is 1.
MEAN, DEVIATION = 0.305, 0.324


@dataclass(frozen=True)
class Augmentation:
    """Largest random rotation (degrees), shift and zoom (fractions of the image) of a training image."""

    rotation_degrees: float = 0.0
    shift_ratio: float = 0.0
    zoom_ratio: float = 0.0


class Digits(Dataset[tuple[dict[str, Tensor], int]]):
    """One split, scaled from 8×8 to ``size``×``size``; images are float32 [1, size, size] with mean 0, deviation 1."""

    def __init__(self, split: Split, size: int, augmentation: Augmentation | None = None) -> None:
        from sklearn.datasets import load_digits  # takes a second, which a run that reuses everything saves

        images, labels = load_digits(return_X_y=True)
        chosen = split_indices(labels)[split]
        pixels = torch.from_numpy(images[chosen]).float().reshape(-1, 1, 8, 8) / 16
        scaled = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        self.images = (scaled - MEAN) / DEVIATION
        self.labels = labels[chosen]
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        image = self.images[index]
        if self.augmentation:
            image = randomly_moved(image, self.augmentation)
        return {"image": image}, int(self.labels[index])


def split_indices(labels: np.ndarray) -> dict[Split, np.ndarray]:
    """Indices of each split; every split holds every digit in the same proportion."""
    generator = np.random.default_rng(SPLIT_SEED)
    parts: dict[Split, list[np.ndarray]] = {"train": [], "calibration": [], "evaluation": []}
    for digit in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == digit))
        evaluation = round(len(shuffled) * EVALUATION_SHARE)
        calibration = evaluation + round(len(shuffled) * CALIBRATION_SHARE)
        parts["evaluation"].append(shuffled[:evaluation])
        parts["calibration"].append(shuffled[evaluation:calibration])
        parts["train"].append(shuffled[calibration:])
    return {split: np.sort(np.concatenate(chunks)) for split, chunks in parts.items()}


def randomly_moved(image: Tensor, augmentation: Augmentation) -> Tensor:
    """The image [1, H, W] under a random rotation, zoom and shift, drawn from torch's global generator."""
    turn, zoom, dx, dy = (2 * torch.rand(4) - 1).tolist()
    angle = math.radians(augmentation.rotation_degrees) * turn
    scale = 1 + augmentation.zoom_ratio * zoom
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    shift = 2 * augmentation.shift_ratio
    matrix = torch.tensor([[[cos, -sin, shift * dx], [sin, cos, shift * dy]]])
    grid = functional.affine_grid(matrix, [1, *image.shape], align_corners=False)
    return functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
