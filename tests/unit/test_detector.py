import json

import numpy as np
import pytest
import torch

from jetway.tasks.importance import accumulate_gradients
from jetway.tasks.workload import call_network, check_workload
from jetway.tasks.workloads.detector import (
    Cells,
    SceneDetector,
    assign_cells,
    box_overlaps,
    decode_boxes,
    decode_detections,
    suppress,
)


@pytest.fixture(scope="module")
def workload():
    return SceneDetector(size=64, widths=[16, 32, 32], neck=32, scenes=[24, 8, 8])


def test_it_is_a_workload(workload):
    check_workload(workload)


@pytest.mark.parametrize(("size", "widths", "cells"), [(96, [16, 16, 16], 180), (128, [16, 16, 16, 16], 336)])
def test_every_level_predicts(size, widths, cells):
    workload = SceneDetector(size=size, widths=widths, neck=16)
    outputs = call_network(workload.network(), workload.example_inputs(), workload.output_names)
    assert outputs["class_logits"].shape == (1, 10, cells)
    assert outputs["distances"].shape == (1, 4, cells)
    assert len(workload.cells.stride) == cells


def test_boxes_are_distances_from_the_centre_of_a_cell():
    cells = Cells(32, strides=[8, 16])
    boxes = decode_boxes(torch.tensor([1.0, 0.5, 2.0, 1.5])[None, :, None].expand(1, 4, 20), cells)
    assert boxes[0, 0].tolist() == [4 - 8, 4 - 4, 4 + 16, 4 + 12]
    assert boxes[0, 16].tolist() == [8 - 16, 8 - 8, 8 + 32, 8 + 24]


def test_objects_belong_to_cells_near_their_middle_by_size():
    cells = Cells(64, strides=[8, 16])
    boxes = torch.tensor([[[10.0, 10.0, 22.0, 22.0], [20.0, 20.0, 60.0, 60.0], [-1.0] * 4]])
    owner = assign_cells(boxes, torch.tensor([[3, 5, -1]]), cells)[0]
    assert set(owner[cells.stride == 8].tolist()) == {-1, 0}
    assert set(owner[cells.stride == 16].tolist()) == {-1, 1}
    middle = cells.centres[owner == 0].mean(dim=0)
    assert torch.allclose(middle, torch.tensor([16.0, 16.0]), atol=4)


def test_overlaps_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0]])
    others = torch.tensor([[2.0, 0.0, 6.0, 4.0], [4.0, 0.0, 6.0, 2.0]])
    iou, generalized = box_overlaps(boxes, others)
    assert iou.tolist() == pytest.approx([8 / 24, 0.0])
    assert generalized.tolist() == pytest.approx([8 / 24, 0 - 4 / 12])


def test_the_best_of_overlapping_detections_of_a_class_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [20, 20, 30, 30]], dtype=float)
    kept = suppress(boxes, np.array([0.6, 0.9, 0.5, 0.3]), np.array([1, 1, 2, 1]))
    assert kept == [1, 2, 3]


def perfect_outputs(target, cells):
    """What a network would answer that knows."""
    owner = assign_cells(target["boxes"][None], target["labels"][None], cells)[0]
    logits, distances = np.full((10, len(owner)), -20.0), np.ones((4, len(owner)))
    for cell in torch.nonzero(owner >= 0)[:, 0].tolist():
        box, centre = target["boxes"][owner[cell]], cells.centres[cell]
        logits[target["labels"][owner[cell]], cell] = 5.0
        sides = torch.cat([centre - box[:2], box[2:] - centre]) / cells.stride[cell]
        distances[:, cell] = sides.numpy()
    return {"class_logits": logits, "distances": distances}


def test_perfect_outputs_score_one(workload):
    data = workload.evaluation_data()
    records = [
        workload.score_sample(perfect_outputs(data[i][1], workload.cells), data[i][1]) for i in range(8)
    ]
    assert json.loads(json.dumps(records)) == records
    assert workload.summarize(records) == pytest.approx({"map50_95": 1.0, "map50": 1.0}, abs=1e-3)


def test_silence_scores_nothing(workload):
    boxes, scores, _ = decode_detections(np.full((10, 80), -20.0), np.ones((4, 80)), workload.cells)
    assert len(boxes) == len(scores) == 0


def test_loss_falls(workload):
    torch.manual_seed(0)
    network = workload.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    inputs, target = workload.collate([workload.train_data()[i] for i in range(8)])
    losses = []
    for _ in range(30):
        loss = workload.loss(call_network(network, inputs, workload.output_names), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses


def test_an_image_without_objects_has_a_loss(workload):
    outputs = {"class_logits": torch.zeros(2, 10, 80, requires_grad=True), "distances": torch.ones(2, 4, 80)}
    target = {"boxes": torch.full((2, 6, 4), -1.0), "labels": torch.full((2, 6), -1)}
    loss = workload.loss(outputs, target)
    loss.backward()
    assert loss.item() > 0


def test_every_parameter_learns(workload, make_context, tmp_path):
    network = workload.network()
    accumulate_gradients(network, make_context(workload, tmp_path), samples=8)
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
