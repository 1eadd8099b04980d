"""Networks by import path: what torchvision, timm, transformers and others make, on images in folders.

    class_path: jetway.tasks.workloads.imported:ImageClassifier
    options:
      factory: timm:create_model
      arguments: {model_name: convnext_tiny, num_classes: 10}
      data: images                   # train/, calibration/ and evaluation/, each with a folder a class

The packages are the user's own: none of them is a dependency of Jetway. Where a factory wants an object, such
as transformers' configurations, an argument may be a mapping with a ``factory`` of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from jetway.data.image_folder import (
    DEVIATION,
    IGNORED,
    MEAN,
    ClassifiedImages,
    Preparation,
    SegmentedImages,
    class_names,
)
from jetway.tasks.errors import ConfigError
from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Inputs, Outputs, Record, Workload

# Share of the shorter side that a random crop keeps at least, in training and, weaker, in QAT.
_TRAINING_CROP, _QAT_CROP = 0.5, 0.9


class ImportedNetwork(Workload):
    """What the workloads of this module share: a network made by ``factory(**arguments)``, and images of ``data``."""

    output_names: tuple[str, ...] = ("logits",)

    def __init__(
        self,
        factory: str,
        data: str,
        arguments: Mapping[str, Any] | None = None,
        size: int = 224,
        mean: Sequence[float] = MEAN,
        deviation: Sequence[float] = DEVIATION,
    ) -> None:
        self.factory, self.arguments = factory, dict(arguments or {})
        self.folder = Path(data).expanduser()
        self.preparation = Preparation(size, tuple(mean), tuple(deviation))
        imported(factory)

    def network(self) -> nn.Module:
        made = call_factory({"factory": self.factory, **self.arguments}, key="workload.options")
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"workload.options.factory: {self.factory} made a {type(made).__name__}, not a torch.nn.Module."
            )
        return made

    def example_inputs(self) -> Inputs:
        return {"image": torch.zeros(1, 3, self.preparation.size, self.preparation.size)}

    def images(self, split: str, smallest_crop: float = 1.0) -> Dataset[Any]:
        raise NotImplementedError

    def train_data(self) -> Dataset[Any]:
        return self.images("train", _TRAINING_CROP)

    def qat_data(self) -> Dataset[Any]:
        return self.images("train", _QAT_CROP)

    def calibration_data(self) -> Dataset[Any]:
        return self.images("calibration")

    def evaluation_data(self) -> Dataset[Any]:
        return self.images("evaluation")


class ImageClassifier(ImportedNetwork):
    """Classifies images; a network's outputs beside the logits, as transformers gives them, are not used."""

    metrics = (
        Metric(
            name="top1", best=1.0, description="share of the evaluation images whose largest logit is right"
        ),
    )

    def __init__(self, factory: str, data: str, **options: Any) -> None:
        super().__init__(factory, data, **options)
        self.labels = class_names(self.folder / "train")

    def images(self, split: str, smallest_crop: float = 1.0) -> ClassifiedImages:
        return ClassifiedImages(
            self.folder / split, self.labels, self.preparation, smallest_crop=smallest_crop
        )

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs["logits"], target)


class ImageSegmenter(ImportedNetwork):
    """Gives each pixel a class; logits may be coarser than the masks, and are then scaled up."""

    metrics = (
        Metric(
            name="miou", best=1.0, description="intersection over union, the mean over the classes that occur"
        ),
        Metric(
            name="pixel_accuracy", best=1.0, description="share of the evaluation pixels whose class is right"
        ),
    )

    def images(self, split: str, smallest_crop: float = 1.0) -> SegmentedImages:
        return SegmentedImages(self.folder / split, self.preparation, smallest_crop=smallest_crop)

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        logits = _scaled(outputs["logits"], target.shape[-2:])
        return functional.cross_entropy(logits, target, ignore_index=IGNORED)

    def score_sample(self, outputs: Mapping[str, np.ndarray[Any, Any]], target: Tensor) -> Record:
        """Pixels of each class: in both, predicted, and true."""
        logits = _scaled(torch.from_numpy(outputs["logits"])[None].float(), target.shape)[0]
        counted = target != IGNORED
        predicted, true = logits.argmax(0)[counted], target[counted]
        return {
            "both": _pixels(true[predicted == true], len(logits)),
            "predicted": _pixels(predicted, len(logits)),
            "true": _pixels(true, len(logits)),
        }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        both, predicted, true = (
            np.sum([record[key] for record in records], axis=0) for key in ("both", "predicted", "true")
        )
        union = predicted + true - both
        return {
            "miou": float(np.mean(both[union > 0] / union[union > 0])),
            "pixel_accuracy": float(both.sum() / max(1, true.sum())),
        }


def imported(path: str) -> Callable[..., Any]:
    """What ``package.module:name`` names; a dotted name goes on into it. Raises ConfigError."""
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as exc:
        raise ConfigError(
            f"workload.options: cannot import {module_name!r} of the factory {path!r}: {exc}. "
            f"Install it into Jetway's environment: pip install {module_name.partition('.')[0]}"
        ) from exc
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(
            f"workload.options: {module_name} has no callable {name!r}. A factory is package.module:name."
        )
    return found  # type: ignore[no-any-return]


def call_factory(given: Mapping[str, Any], *, key: str) -> Any:
    """Calls the factory of a mapping with the rest of it, factories inside first. Raises ConfigError."""
    arguments = {
        name: call_factory(value, key=f"{key}.{name}")
        if isinstance(value, Mapping) and "factory" in value
        else value
        for name, value in given.items()
        if name != "factory"
    }
    try:
        return imported(given["factory"])(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError, OSError) as exc:
        raise ConfigError(f"{key}: {given['factory']}(**{arguments}) fails: {exc}") from exc


def _scaled(logits: Tensor, size: Sequence[int]) -> Tensor:
    if logits.shape[-2:] == tuple(size):
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _pixels(classes: Tensor, count: int) -> list[int]:
    counted: list[int] = torch.bincount(classes, minlength=count).tolist()
    return counted
