"""Networks and data that cannot be taken as they are: each is told what to change before much is done, or works."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jetway.configs.schema import ExportConfig, FinetuneConfig, Precision, PruneConfig, QatConfig, TrainConfig
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.errors import ExportError, PruningError, QuantizationError, WorkloadError
from jetway.tasks.export import export_onnx
from jetway.tasks.frames import Boxes, FrameInput, FrameProcessing, Masks
from jetway.tasks.load import load_baseline
from jetway.tasks.prune import prune_network
from jetway.tasks.qat import quantize_ptq, train_qat
from jetway.tasks.workload import Workload, check_training_data, check_workload


class Images(Workload):
    output_names = ("logits",)

    def __init__(self, network, **changes):
        self.made = network
        vars(self).update(changes)

    def network(self):
        return self.made()

    def example_inputs(self):
        return {"x": torch.zeros(1, 3, 8, 8)}

    def data(self, seed, count):
        x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return [({"x": image}, index % 5) for index, image in enumerate(x)]

    def train_data(self):
        return self.data(0, 20)

    def calibration_data(self):
        return self.data(1, 8)

    def evaluation_data(self):
        return self.data(2, 10)

    def loss(self, outputs, target):
        return F.cross_entropy(outputs["logits"], target)


class Plain(nn.Module):
    """Two convolutions and a classifier; ``middle`` is what lies between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.head(self.conv(self.middle(F.relu(self.stem(x)))).mean(dim=(2, 3)))


class Gate(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return self.read(x)


READS = {
    "a branch": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.mean().item(),
    "an index": lambda x: x[:, : int(x.argmax()) + 1].mean(dim=1, keepdim=True) + x,
    "float": lambda x: x * float(x.max()),
    "asarray": lambda x: x * float(np.asarray(x).max()),
}


def gated(read):
    class Gated(Plain):
        def __init__(self):
            super().__init__()
            self.gate = Gate(read)

        def middle(self, x):
            return self.gate(x)

    return Images(Gated)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_control_flow_by_values_names_the_module_before_any_training(read):
    with pytest.raises(WorkloadError, match=r"depends on values: module 'gate' .*Use torch\.where"):
        check_workload(gated(read))


GATHERS = {
    "nonzero": lambda x: torch.nonzero(x),
    "nonzero of a tensor": lambda x: (x > 0).nonzero(as_tuple=True)[0],
    "argwhere": lambda x: torch.argwhere(x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: torch.unique(x, return_counts=True)[0],
    "unique_consecutive": lambda x: x.flatten().unique_consecutive(),
    "where": lambda x: torch.where(x > 0)[0],
    "an index by a mask": lambda x: x[x > 0],
    "an index by a mask of places": lambda x: x[:, :, (x > 0).any(dim=(0, 1))],
}


@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS.keys())
def test_a_shape_by_values_names_the_module_and_what_to_use_instead(gather):
    def read(x):
        return x + gather(x).numel()

    with pytest.raises(
        WorkloadError, match=r"Shapes depend on values: module 'gate' .*multiply by the mask.*topk"
    ):
        check_workload(gated(read))


KEPT = torch.arange(16) % 2 == 0


@pytest.mark.parametrize(
    "select",
    [
        lambda x: x[:, KEPT].repeat(1, 2, 1, 1),
        lambda x: x + torch.nonzero(KEPT).numel() + torch.where(KEPT)[0].numel(),
        lambda x: torch.where(x > 0, input=x, other=-x) * (x > 0),
        lambda x: x[:, x.mean(dim=(0, 2, 3)).topk(16).indices],
    ],
    ids=["constant mask", "nonzero of a constant", "where and product", "topk"],
)
def test_shapes_by_constants_are_fine(select):
    check_workload(gated(select))


def test_control_flow_by_sizes_and_constants_is_fine(make_context, tmp_path):
    class Sized(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.tensor(2.0))

        def middle(self, x):
            x = F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 4 else x
            return x * float(self.gain) if bool(self.gain > 1) else x

    check_workload(Images(Sized))


def baseline_of(make_context, tmp_path, network, **changes):
    context = make_context(Images(network, **changes), tmp_path)
    return context, save_checkpoint(context.store, context.workload.network().eval(), structure=None)


class WithUnused(Plain):
    def __init__(self):
        super().__init__()
        self.spare, self.scale = nn.Conv2d(16, 16, 1), nn.Parameter(torch.ones(4))


def test_unused_parameters_go_through_every_stage_and_are_named(make_context, tmp_path, caplog):
    context = make_context(Images(WithUnused), tmp_path)
    with caplog.at_level(logging.WARNING, "jetway"):
        baseline = load_baseline(context, None, TrainConfig(epochs=1, batch_size=8)).handle
    assert "train: never used by the loss: scale, spare.weight, spare.bias;" in caplog.text
    assert caplog.text.count("never used") == 1
    pruned = prune_network(context, baseline, PruneConfig(importance="taylor"), FinetuneConfig()).handle
    start = quantize_ptq(context, pruned, QatConfig()).handle
    handle = train_qat(context, start, QatConfig(epochs=1, batch_size=8), None).handle
    assert load_network(context.workload, pruned, context.store).spare.out_channels == 16
    assert export_onnx(context, handle, ExportConfig(), Precision.INT8_QAT).handle.metadata["macs"] > 0


class SharedModule(Plain):
    """One convolution that runs twice."""

    def middle(self, x):
        return F.relu(self.conv(x))


def test_a_shared_module_is_pruned_once_stays_shared_and_is_named(make_context, tmp_path, caplog):
    context, baseline = baseline_of(make_context, tmp_path, SharedModule)
    with caplog.at_level(logging.INFO, "jetway"):
        output = prune_network(context, baseline, PruneConfig(round_to=4), FinetuneConfig())
    assert "prune: used more than once, and cut alike for all uses: conv\n" in caplog.text
    network = load_network(context.workload, output.handle, context.store)
    assert network.conv.in_channels == network.conv.out_channels == network.head.in_features == 8


def test_no_module_is_pruned_to_zero(make_context, tmp_path):
    context, baseline = baseline_of(make_context, tmp_path, Plain)
    config = PruneConfig(pruning_ratio=0.99, max_pruning_ratio=0.99, round_to=1)
    network = load_network(
        context.workload, prune_network(context, baseline, config, FinetuneConfig()).handle, context.store
    )
    assert network.stem.out_channels == network.conv.out_channels == 1


def test_a_target_that_needs_a_module_pruned_to_zero_says_how_close(make_context, tmp_path):
    context, baseline = baseline_of(make_context, tmp_path, Plain)
    config = PruneConfig(target_macs_ratio=0.001, max_pruning_ratio=0.99, round_to=1)
    most = r", most of it in stem \(8\d%, 1 of 16 channels\), conv .*, head \(\d%, 5 of 5 channels\)\. Raise"
    with pytest.raises(PruningError, match=most):
        prune_network(context, baseline, config, FinetuneConfig())


class Unsupported(Plain):
    class Roots(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x) + x.mean(dim=3)

    def __init__(self):
        super().__init__()
        self.roots = self.Roots()

    def middle(self, x):
        return x + self.roots(x)[..., None]


def test_an_unsupported_operator_is_named_with_its_module(make_context, tmp_path):
    context, baseline = baseline_of(make_context, tmp_path, Unsupported)
    with pytest.raises(ExportError, match=r"linalg_svd.*used in roots"):
        export_onnx(context, baseline, ExportConfig(), Precision.FP32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a", "b")}, r"Images\.labels has 2 names, but the output 'logits' .* has 5 classes"),
        (
            {"evaluation_data": lambda: [({"x": torch.zeros(3, 9, 8)}, 0)]},
            r"evaluation_data\(\)\[0\] gives 'x' as torch\.float32 \[3, 9, 8\], example_inputs\(\) has .*\[3, 8, 8\]",
        ),
        (
            {"calibration_data": lambda: [({"x": torch.zeros(3, 8, 8, dtype=torch.uint8)}, 0)]},
            r"calibration_data\(\)\[0\] gives 'x' as torch\.uint8",
        ),
        (
            {"evaluation_data": lambda: [({"image": torch.zeros(3, 8, 8)}, 0)]},
            r"evaluation_data\(\)\[0\] gives the inputs \['image'\], example_inputs\(\) has \['x'\]",
        ),
    ],
    ids=["labels", "shape", "dtype", "names"],
)
def test_data_that_do_not_fit_the_network_are_refused_before_training(changes, message):
    with pytest.raises(WorkloadError, match=message):
        check_workload(Images(Plain, **changes))


ODD_ONE_LAST = [({"x": torch.zeros(3, size, 8)}, 0) for size in (8, 8, 9)]


@pytest.mark.parametrize("source", ["train_data", "qat_data", "calibration_data", "evaluation_data"])
def test_a_last_sample_of_another_shape_is_refused(source, make_context, tmp_path):
    context = make_context(Images(Plain, **{source: lambda: ODD_ONE_LAST}), tmp_path)
    with pytest.raises(WorkloadError, match=rf"{source}\(\)\[2\] gives 'x' as torch\.float32 \[3, 9, 8\]"):
        load_baseline(context, None, TrainConfig(epochs=1))


def test_training_data_may_be_left_out_and_random_numbers_stay():
    def missing():
        raise NotImplementedError

    state = torch.get_rng_state()
    check_training_data(Images(Plain, train_data=missing, qat_data=lambda: [({"x": torch.rand(3, 8, 8)}, 0)]))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("results", "output"),
    [
        (Boxes(class_logits="logits", distances="distances", strides=(8,)), (1, 5, 4)),
        (Masks(output="logits"), (1, 5, 8, 8)),
    ],
    ids=["boxes", "masks"],
)
def test_labels_are_counted_against_detectors_and_segmenters_too(results, output):
    class Maps(nn.Module):
        def forward(self, x):
            return x.mean() + torch.zeros(output), x.mean() + torch.zeros(1, 4, 4)

    frames = FrameProcessing(input=FrameInput(name="x", size=(8, 8)), results=results)
    changes = {"output_names": ("logits", "distances"), "frame_processing": lambda: frames}
    check_workload(Images(Maps, labels=tuple("abcde"), **changes))
    with pytest.raises(WorkloadError, match=r"labels has 2 names, but the output 'logits' .* has 5 classes"):
        check_workload(Images(Maps, labels=("a", "b"), **changes))


def test_labels_out_of_range_are_a_workload_error(make_context, tmp_path):
    wrong = {"train_data": lambda: [({"x": torch.zeros(3, 8, 8)}, 7)] * 4}
    context = make_context(Images(Plain, **wrong), tmp_path)
    with pytest.raises(WorkloadError, match=r"Target 7 is out of bounds"):
        load_baseline(context, None, TrainConfig(epochs=1))


def test_an_empty_calibration_set_is_refused(make_context, tmp_path):
    context, baseline = baseline_of(make_context, tmp_path, Plain, calibration_data=list)
    with pytest.raises(QuantizationError, match=r"calibration_data\(\) is empty"):
        quantize_ptq(context, baseline, QatConfig())
