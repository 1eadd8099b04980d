"""What the reference workloads on cluttered scenes share: their splits, augmentation, and what a scene shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from jetway.data.digits import Split
from jetway.data.scene_augmentation import Augmentation
from jetway.data.scenes import SceneConfig
from jetway.tasks.workload import Workload

#: QAT adjusts weights, it learns no new invariance: weaker views keep the ranges those of real images.
QAT_SHARE = 0.3


class SceneWorkload(Workload):
    """``scenes`` are the numbers of training, calibration and evaluation scenes.

    ``augmentation`` is the strength from 0 to 1 of what training scenes are shown with, other windows and lights, and
    ``qat_augmentation`` that in QAT, where it is weaker: by default 0.3 of it. Below 1 ``min_exposure_ratio`` makes
    scenes of all splits dark, down to that share of the light; ranges of activations are harder to choose then.
    """

    #: At strength 1.
    strongest = Augmentation(crop_ratio=0.4, light_ratio=0.3)

    def __init__(
        self,
        config: SceneConfig,
        scenes: tuple[int, int, int] = (2400, 256, 500),
        augmentation: float = 0.0,
        qat_augmentation: float | None = None,
        min_exposure_ratio: float = 1.0,
    ) -> None:
        self.scene_config = replace(config, min_exposure_ratio=min_exposure_ratio)
        self.counts: dict[Split, int] = dict(zip(("train", "calibration", "evaluation"), scenes, strict=True))
        self.augmentation = augmentation
        self.qat_augmentation = QAT_SHARE * augmentation if qat_augmentation is None else qat_augmentation
        if not 0 <= self.qat_augmentation <= self.augmentation <= 1:
            raise ValueError(
                f"augmentation is {self.augmentation} and qat_augmentation {self.qat_augmentation}, but both go from "
                "0 to 1, and QAT's is the weaker one"
            )

    def data(self, split: Split, augmentation: Augmentation | None = None) -> Dataset[Any]:
        raise NotImplementedError

    def train_data(self) -> Dataset[Any]:
        return self._augmented(self.augmentation)

    def qat_data(self) -> Dataset[Any]:
        return self._augmented(self.qat_augmentation)

    def calibration_data(self) -> Dataset[Any]:
        return self.data("calibration")

    def evaluation_data(self) -> Dataset[Any]:
        return self.data("evaluation")

    def _augmented(self, strength: float) -> Dataset[Any]:
        return self.data("train", self.strongest.at(strength) if strength else None)
