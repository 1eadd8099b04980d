import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jetway.tasks.average_precision import match_detections, mean_average_precision
from jetway.tasks.statistics import Resampled, paired_drop

SQUARE = [0.0, 0.0, 10.0, 10.0]


def record(boxes, scores, labels, true_boxes, true_labels, classes=2):
    shaped = [np.array(values, dtype=float).reshape(-1, 4) for values in (boxes, true_boxes)]
    found = match_detections(
        shaped[0],
        np.array(scores),
        np.array(labels, int),
        shaped[1],
        np.array(true_labels, int),
        classes=classes,
    )
    return json.loads(json.dumps(found))


def scored(*records, classes=2):
    return mean_average_precision(records, classes=classes)


def test_a_perfect_detection_scores_one():
    values = scored(record([SQUARE], [0.9], [0], [SQUARE], [0]))
    assert values == pytest.approx({"map50_95": 1.0, "map50": 1.0})


def test_iou_decides_how_many_thresholds_are_met():
    # 7 of 10 columns are shared: IoU 0.701 meets 0.50, 0.55, 0.60, 0.65 and 0.70
    values = scored(record([[0, 0, 7.01, 10]], [0.9], [0], [SQUARE], [0]))
    assert values == pytest.approx({"map50_95": 0.5, "map50": 1.0})


def test_a_better_scored_wrong_detection_halves_the_precision():
    far = [50.0, 50.0, 60.0, 60.0]
    values = scored(record([SQUARE, far], [0.5, 0.9], [0, 0], [SQUARE], [0]))
    assert values["map50"] == pytest.approx(0.5)


def test_a_detection_of_another_class_counts_for_neither():
    values = scored(record([SQUARE], [0.9], [1], [SQUARE], [0]))
    assert values["map50"] == 0.0


def test_a_second_detection_of_the_same_object_is_wrong():
    one, two = record([SQUARE] * 2, [0.9, 0.8], [0, 0], [SQUARE], [0]), record([], [], [], [SQUARE], [0])
    # recall ends at one half: 51 of the 101 recall points have precision 1
    assert scored(one, two)["map50"] == pytest.approx(51 / 101)


def test_images_without_anything_score_nothing():
    assert scored(record([], [], [], [], [])) == {"map50_95": 0.0, "map50": 0.0}


def scene(generator, classes):
    true = generator.uniform(0, 60, (4, 2))
    true = np.hstack([true, true + generator.uniform(8, 30, (4, 2))])
    labels = generator.integers(classes, size=4)
    boxes = np.repeat(true, 3, axis=0) + generator.normal(0, 2, (12, 4))
    guessed = np.where(generator.random(12) < 0.7, np.repeat(labels, 3), generator.integers(classes, size=12))
    return boxes, generator.random(12), guessed, true, labels


def as_data_set(images, classes):
    data = COCO()
    data.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": c} for c in range(classes)],
        "annotations": [
            {
                "image_id": i,
                "category_id": int(c),
                "bbox": [*b[:2], *(b[2:] - b[:2])],
                "score": s,
                "iscrowd": 0,
            }
            | {"area": float((b[2:] - b[:2]).prod())}
            for i, (boxes, labels, scores) in enumerate(images)
            for b, c, s in zip(boxes, labels, scores, strict=True)
        ],
    }
    for number, annotation in enumerate(data.dataset["annotations"], 1):
        annotation["id"] = number
    data.createIndex()
    return data


def test_records_give_what_the_evaluator_gives_for_all_images_at_once():
    generator, classes = np.random.default_rng(0), 5
    images = [scene(generator, classes) for _ in range(30)]
    records = [match_detections(*image, classes=classes) for image in images]
    truth = as_data_set([(true, labels, np.ones(4)) for *_, true, labels in images], classes)
    found = as_data_set([(boxes, labels, scores) for boxes, scores, labels, _, _ in images], classes)
    evaluator = COCOeval(truth, found, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    expected = {"map50_95": evaluator.stats[0], "map50": evaluator.stats[1]}
    assert 0.1 < expected["map50_95"] < 0.9
    assert mean_average_precision(records, classes=classes) == pytest.approx(expected, abs=1e-12)


def test_nothing_is_printed(capsys):
    scored(record([SQUARE], [0.9], [0], [SQUARE], [0]))
    assert capsys.readouterr().out == ""


def test_a_paired_interval_comes_from_resampled_images():
    generator = np.random.default_rng(1)
    images = [scene(generator, 5) for _ in range(40)]
    better = [match_detections(*image, classes=5) for image in images]
    worse = [
        match_detections(image[0] + 1.5, *image[1:], classes=5) if i % 2 else record
        for i, (image, record) in enumerate(zip(images, better, strict=True))
    ]
    summarize = lambda records: mean_average_precision(records, classes=5)  # noqa: E731
    drop, (low, high) = paired_drop(*(Resampled(each, summarize) for each in (better, worse)), "map50_95")
    assert drop == pytest.approx(summarize(better)["map50_95"] - summarize(worse)["map50_95"])
    assert 0 < low < drop < high
