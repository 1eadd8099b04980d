"""Mean average precision as COCO defines it, computed by pycocotools, from records that can be resampled.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. The evaluator matches detections to true
boxes image by image, and that is what a record keeps; precision over recall is accumulated from any set of
records, so that a bootstrap resample costs milliseconds. Its figures are the evaluator's, which a test holds.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("jetway")

Array = NDArray[Any]
Record = dict[str, Any]

_EVERY_AREA = [0.0, 1e10]
#: COCO's thresholds and recalls, to the last bit as its evaluator has them.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def match_detections(
    boxes: Array, scores: Array, labels: Array, true_boxes: Array, true_labels: Array, *, classes: int
) -> Record:
    """One image's detections matched to its true boxes, as JSON.

    Boxes [n, 4] are x1, y1, x2, y2. The record has the label of every true box, and for each detection its label,
    its score, and the IoU thresholds that it meets as bits.
    """
    truth = _annotations(true_boxes, true_labels)
    detections = _annotations(boxes, labels)
    for detection, score in zip(detections, scores, strict=True):
        detection["score"] = float(score)
    found = _evaluated(truth, detections, classes).evalImgs if truth or detections else []
    return {
        "truths": [int(label) for label in true_labels],
        "detections": [detection for image in found if image for detection in _matches(image)],
    }


def mean_average_precision(records: Sequence[Record], *, classes: int) -> dict[str, float]:
    """``map50_95`` and ``map50`` of the images: the means over the classes that they show; 0 when they show none."""
    truths = np.array([label for record in records for label in record["truths"]], dtype=int)
    rows = [row for record in records for row in record["detections"]]
    labels, scores, masks = np.array(rows, dtype=float).reshape(-1, 3).T
    met = (masks.astype(int) >> np.arange(len(IOU_THRESHOLDS))[:, None]) & 1
    counts = np.bincount(truths, minlength=classes)
    precisions = [
        _average_precisions(scores[labels == label], met[:, labels == label], counts[label])
        for label in np.flatnonzero(counts)
    ]
    if not precisions:
        return {"map50_95": 0.0, "map50": 0.0}
    return {"map50_95": float(np.mean(precisions)), "map50": float(np.mean(precisions, axis=0)[0])}


def _average_precisions(scores: Array, met: Array, truths: int) -> Array:
    """Average precision of one class at each IoU threshold, from the thresholds [T, n] that n detections meet.

    Precision at a recall is the best one at that recall or more, taken at 101 recalls, as the evaluator does.
    """
    hits = met[:, np.argsort(-scores, kind="stable")].cumsum(axis=1)
    precision = hits / np.arange(1, len(scores) + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(envelope, [(0, 0), (0, 1)])
    places = [np.searchsorted(row, RECALLS) for row in hits / truths]
    return np.asarray(np.take_along_axis(padded, np.array(places), axis=1).mean(axis=1))


def _annotations(boxes: Array, labels: Array) -> list[dict[str, Any]]:
    return [
        {
            "id": index + 1,
            "image_id": 0,
            "category_id": int(label),
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "area": float((x2 - x1) * (y2 - y1)),
            "iscrowd": 0,
        }
        for index, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels, strict=True))
    ]


def _evaluated(truth: list[dict[str, Any]], detections: list[dict[str, Any]], classes: int) -> Any:
    evaluator = _evaluator(classes)
    evaluator.cocoGt, evaluator.cocoDt = _data_set(truth, classes), _data_set(detections, classes)
    evaluator.params.imgIds = [0]
    evaluator.params.maxDets = [max(1, len(detections))]
    evaluator.evaluate()
    return evaluator


def _evaluator(classes: int) -> Any:
    evaluator = _pycocotools("cocoeval").COCOeval(iouType="bbox")
    evaluator.params.catIds = list(range(classes))
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [_EVERY_AREA], ["all"]
    return evaluator


def _data_set(annotations: list[dict[str, Any]], classes: int) -> Any:
    data = _pycocotools("coco").COCO()
    data.dataset = {
        "images": [{"id": 0}],
        "annotations": annotations,
        "categories": [{"id": label} for label in range(classes)],
    }
    data.createIndex()
    return data


def _matches(image: dict[str, Any]) -> list[list[float]]:
    bits = 1 << np.arange(len(image["dtMatches"]))
    met = bits @ (image["dtMatches"] > 0)
    return [
        [int(image["category_id"]), score, int(mask)]
        for score, mask in zip(image["dtScores"], met, strict=True)
    ]


@lru_cache(maxsize=2)
def _pycocotools(name: str) -> Any:
    """A module of pycocotools. It reports on stdout, which belongs to our caller: that goes to the debug log."""
    module = importlib.import_module(f"pycocotools.{name}")
    module.__dict__["print"] = lambda *words: logger.debug(" ".join(map(str, words)))
    return module
