"""The reference workload of cameras and LiDAR: its parts, its metrics, and its way through the stages, small."""

import json

import numpy as np
import pytest
import torch

from jetway.configs.schema import (
    BACKENDS,
    ExportConfig,
    FinetuneConfig,
    Precision,
    PruneConfig,
    QatConfig,
    TensorRtConfig,
    VerifyConfig,
)
from jetway.data.driving.frames import Grid
from jetway.data.driving.sensors import Rig
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower_onnx
from jetway.tasks.prune import prune_network
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.statistics import Resampled, paired_drop
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workload import call_network
from jetway.tasks.workloads.bev.detection import (
    Detections,
    average_precision,
    find_objects,
    match_objects,
    mean_average_precision,
)
from jetway.tasks.workloads.bev.swin import SwinBlock, Windows
from jetway.tasks.workloads.bev.view_transform import DepthBins, LiftSplat, VoxelViews, voxel_centers
from jetway.tasks.workloads.bev_fusion import BevFusionWorkload

SMALL = {
    "channels": 16, "dims": (16, 32), "depths": (2, 1), "num_heads": (2, 4), "frames": 4, "evaluation_frames": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def workload():
    return BevFusionWorkload(**SMALL)


@pytest.fixture(scope="module")
def batch(workload):
    data = workload.train_data()
    return workload.collate([data[index] for index in range(4)])


def test_outputs_are_maps_of_the_grid(workload, batch):
    outputs = call_network(workload.network().eval(), batch[0], workload.output_names)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "heatmap": (4, 3, 24, 24),
        "boxes": (4, 8, 24, 24),
        "segmentation": (4, 4, 24, 24),
    }


def test_both_sensors_reach_both_tasks(workload, batch):
    network = workload.network().eval()
    before = call_network(network, batch[0], workload.output_names)
    for name in batch[0]:
        changed = dict(batch[0]) | {name: batch[0][name] + 1}
        after = call_network(network, changed, workload.output_names)
        assert all(not torch.allclose(before[key], after[key], atol=1e-5) for key in before)


def test_a_few_steps_lower_the_loss(workload, batch):
    network = workload.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = workload.loss(call_network(network, batch[0], workload.output_names), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def perfect_outputs(target):
    heatmap = target["heatmap"].clamp(1e-4, 1 - 1e-4).logit()
    segmentation = torch.nn.functional.one_hot(target["segmentation"], 4).permute(2, 0, 1)
    outputs = {"heatmap": heatmap, "boxes": target["boxes"], "segmentation": segmentation.float()}
    return {name: output.numpy() for name, output in outputs.items()}


def test_targets_score_full_marks_and_noise_scores_none(workload):
    data = workload.evaluation_data()
    targets = [data[index][1] for index in range(len(data))]
    records = [workload.score_sample(perfect_outputs(target), target) for target in targets]
    assert json.loads(json.dumps(records)) == records
    # a flat background is full of maxima, which come last
    assert workload.summarize(records) == pytest.approx({"map": 1.0, "miou": 1.0}, abs=0.005)
    wrong = {name: -output for name, output in perfect_outputs(targets[0]).items()}
    scores = workload.summarize([workload.score_sample(wrong, target) for target in targets])
    assert scores["map"] < 0.1
    assert scores["miou"] < 0.3


def test_a_paired_drop_of_both_metrics_has_an_interval(workload):
    data = workload.evaluation_data()
    targets = [data[index][1] for index in range(len(data))]
    good = [workload.score_sample(perfect_outputs(target), target) for target in targets]
    bad = [workload.score_sample(perfect_outputs(targets[0]), target) for target in targets]
    for metric in ("map", "miou"):
        drop, (low, high) = paired_drop(
            *(Resampled(each, workload.summarize) for each in (good, bad)), metric
        )
        assert low <= drop <= high
        assert drop > 0.1


def test_found_objects_stand_where_the_heatmap_and_the_offsets_say():
    grid = Grid(extent_m=4.0, cells=8, pillars=16)
    heatmap, boxes = np.full((3, 8, 8), -9.0), np.zeros((8, 8, 8))
    heatmap[1, 2, 5], heatmap[1, 2, 6], heatmap[0, 7, 0] = 2.0, 1.0, 0.0
    boxes[:2, 2, 5] = 0.25, -0.5
    found = find_objects(heatmap, boxes, grid, limit=2)
    assert found.kinds.tolist() == [1, 0]
    assert np.allclose(found.scores, [1 / (1 + np.exp(-2.0)), 0.5])
    assert np.allclose(found.centers, [[-1.25, 1.0], [3.5, -3.5]])


def test_match_objects_gives_an_object_to_the_most_certain_and_the_nearest():
    detections = Detections(
        np.array([0, 0, 1]), np.array([0.9, 0.8, 0.7]), np.array([[0.7, 0.0], [0.1, 0.0], [5.0, 0.0]])
    )
    matches = match_objects(detections, np.array([0.0, 0.0]), np.array([[0.0, 0.0], [5.0, 0.0]]))
    assert matches == [
        [0.0, 0.9, 0.0, 1.0, 1.0, 1.0],
        [0.0, 0.8, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.7, 0.0, 0.0, 0.0, 0.0],
    ]


RECALLS = np.arange(11, 101) / 100


@pytest.mark.parametrize(
    ("hits", "objects", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([], 2, 0.0),
        ([0, 0], 2, 0.0),
        # Precision 1 up to recall 0.5, nothing behind it: 40 of the 90 recalls that count.
        ([1], 2, 40 / 90),
        # Precision rises from 0 at recall 0 to a half at recall 1.
        ([0, 1], 1, float(np.clip(RECALLS / 2 - 0.1, 0, None).mean() / 0.9)),
        # Precision falls from 1 at recall a half to two thirds at recall 1.
        ([1, 0, 1], 2, float((np.interp(RECALLS, [0.5, 0.5, 1], [1, 0.5, 2 / 3]) - 0.1).mean() / 0.9)),
    ],
)
def test_average_precision_of_cases_worked_by_hand(hits, objects, expected):
    assert average_precision(np.array(hits, dtype=float), objects) == pytest.approx(expected, abs=1e-9)


def test_mean_average_precision_is_over_distances_and_classes_with_objects():
    matches = [[0.0, 0.9, 0.0, 0.0, 1.0, 1.0], [2.0, 0.8, 1.0, 1.0, 1.0, 1.0]]
    assert mean_average_precision(matches, np.array([1, 0, 1])) == pytest.approx((2 / 4 + 1) / 2)
    assert mean_average_precision(matches, np.array([1, 1, 1])) == pytest.approx((2 / 4 + 0 + 1) / 3)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_joined_as_they_were_split(shifted):
    tokens = torch.randn(2, 6, 12, 5)
    windows = Windows((3, 6), (6, 12), shifted=shifted)
    split = windows.split(tokens)
    assert split.shape == (8, 18, 5)
    assert torch.equal(windows.join(split), tokens)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_token_sees_its_window_and_nothing_that_only_the_shift_brought_in(shifted):
    block = SwinBlock(8, 2, (3, 6), (6, 12), shifted=shifted).eval()
    tokens = torch.randn(1, 6, 12, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(tokens)[0, 0, 0].sum(), tokens)
    seen = gradient[0].abs().sum(dim=-1) > 1e-12
    expected = torch.zeros(6, 12, dtype=torch.bool)
    expected[: 1 if shifted else 3, : 3 if shifted else 6] = True
    assert torch.equal(seen, expected)


def test_windows_that_do_not_divide_the_map_are_refused_with_what_to_choose():
    with pytest.raises(
        ValueError, match=r"windows of 4x6 do not divide a feature map of 6x12.*choose another"
    ):
        BevFusionWorkload(**SMALL | {"window": (4, 6)}).network()


def test_a_map_of_odd_size_is_refused():
    with pytest.raises(ValueError, match="cells is 25, but must be even"):
        BevFusionWorkload(cells=25)


def test_lift_splat_is_what_a_loop_over_voxels_gives():
    rig, grid, bins = Rig(), Grid(), DepthBins(1.0, 18.0, 16)
    heights = (0.0, 1.5)
    voxels = voxel_centers(grid.cell_centers(), heights)
    views = VoxelViews.of(rig.ring(), 8, voxels, bins)
    lift = LiftSplat(12, 7, bins.count, views, cameras=4, heights=2, cells=24)
    features = torch.randn(8, 12, 6, 12)
    with torch.no_grad():
        given = lift(features)
        depth, context = lift.depth(features).softmax(dim=1), lift.context(features)
    assert given.shape == (2, 7, 24, 24)
    for cell in [(0, 0), (3, 20), (12, 2), (11, 12), (23, 11)]:
        for sample in range(2):
            expected = sum(voxel_share(rig, cell, z, bins, depth, context, sample) for z in heights)
            assert torch.allclose(given[sample, :, *cell], expected, atol=1e-5)


def voxel_share(rig, cell, z, bins, depth, context, sample):
    x, y = (np.array(cell) + 0.5) * 1.0 - 12
    best, share = np.inf, torch.zeros(context.shape[1])
    for index, camera in enumerate(rig.ring()):
        u, v, distance = camera.project(np.array([x, y, z], dtype=np.float32))
        bin_index = int((distance - bins.nearest_m) / (bins.farthest_m - bins.nearest_m) * bins.count)
        inside = 0 <= u < camera.width and 0 <= v < camera.height and 1 <= distance < 18
        if inside and abs(u - camera.width / 2) < best:
            best = abs(u - camera.width / 2)
            picked = (sample * 4 + index, slice(None), int(v) // 8, int(u) // 8)
            share = context[picked] * depth[picked][bin_index]
    return share


def test_most_of_the_map_is_seen_by_a_camera():
    views = VoxelViews.of(
        Rig().ring(), 8, voxel_centers(Grid().cell_centers(), (0.8,)), DepthBins(1.0, 18.0, 16)
    )
    assert views.seen.mean() > 0.85


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_pruned_and_quantized_it_still_agrees_with_its_onnx(workload, make_context, tmp_path):
    context = make_context(workload, tmp_path)
    torch.manual_seed(0)
    baseline = save_checkpoint(context.store, workload.network().eval(), structure=None)
    config = PruneConfig(pruning_ratio=0.5, head_ratios={"image_encoder.*": 0.5}, round_to=8)
    pruned = prune_network(context, baseline, config, FinetuneConfig()).handle
    check_pruned(load_network(workload, pruned, context.store))
    qat = QatConfig(calibration_samples=8)
    quantized = quantize_ptq(context, pruned, qat).handle
    for checkpoint, exported, forms in [
        (pruned, Precision.FP32, {"ort-cpu": Precision.FP32, "tensorrt": Precision.FP16}),
        (quantized, Precision.INT8_PTQ, dict.fromkeys(("ort-cpu", "tensorrt"), Precision.INT8_PTQ)),
    ]:
        model = export_onnx(context, checkpoint, ExportConfig(), exported).handle
        for backend, precision in forms.items():
            lowered = lower_onnx(context, model, BACKENDS[backend], precision, qat, TensorRtConfig()).handle
            verify_onnx(context, checkpoint, lowered, VerifyConfig(samples=4, int8_atol=0.15), precision)


def check_pruned(network):
    attention = network.image_encoder.stages[1].blocks[0].attention
    assert (attention.num_heads, attention.relative_position_bias_table.shape[1]) == (2, 2)
    assert network.view_transform.depth.out_channels == 16
    assert network.view_transform.context.out_channels == 8
    assert network.fuser[0].out_channels == 8
