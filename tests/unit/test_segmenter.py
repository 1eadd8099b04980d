import json

import numpy as np
import pytest
import torch

from jetway.tasks.workload import call_network, check_workload
from jetway.tasks.workloads.segmenter import MASK_CLASSES, SceneSegmenter, score_masks


@pytest.fixture(scope="module")
def workload():
    return SceneSegmenter(size=64, widths=[16, 32], depths=[1, 1], decoder=16, scenes=[16, 4, 6])


def test_it_is_a_workload(workload):
    check_workload(workload)


def test_logits_have_a_quarter_of_the_resolution():
    workload = SceneSegmenter(size=96, widths=[16, 16, 16], depths=[1, 1, 1], decoder=16)
    outputs = call_network(workload.network(), workload.example_inputs(), workload.output_names)
    assert outputs["logits"].shape == (1, MASK_CLASSES, 24, 24)


def test_masks_by_hand():
    predicted = np.array([[0, 0], [3, 3]])
    true = np.array([[0, 3], [3, 3]])
    record = json.loads(json.dumps(score_masks(predicted, true)))
    assert (record["intersection"][0], record["union"][0]) == (1, 2)
    assert (record["intersection"][3], record["union"][3]) == (2, 3)
    assert sum(record["intersection"]) == 3
    assert record["pixel_ratios"][0] == record["pixel_ratios"][3] == 0.5


def test_metrics_sum_pixels_over_images(workload):
    first = score_masks(np.zeros((64, 64), int), np.zeros((64, 64), int))
    half = np.zeros((64, 64), int)
    half[:32] = 2
    second = score_masks(half, np.zeros((64, 64), int))
    metrics = workload.summarize([first, second])
    assert metrics["pixel_accuracy"] == pytest.approx(0.75)
    # background is right in three quarters of what either has, and what was found of class 2 is all wrong
    assert metrics["miou"] == pytest.approx((0.75 + 0) / 2)


def test_a_network_that_knows_scores_one(workload):
    data = workload.evaluation_data()
    records = []
    for index in range(len(data)):
        _, mask = data[index]
        one_hot = torch.nn.functional.one_hot(mask, MASK_CLASSES).permute(2, 0, 1).numpy()
        records.append(workload.score_sample({"logits": one_hot * 10.0}, mask))
    assert workload.summarize(records) == pytest.approx({"miou": 1.0, "pixel_accuracy": 1.0})


def test_loss_falls(workload):
    torch.manual_seed(0)
    network = workload.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    inputs, target = workload.collate([workload.train_data()[i] for i in range(8)])
    losses = []
    for _ in range(15):
        loss = workload.loss(call_network(network, inputs, workload.output_names), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
