import pytest
import torch
from torch import nn

from jetway.tasks.macs import count_params, total_macs
from jetway.tasks.workload import check_workload
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier, MobileNetV3, round_channels


@pytest.fixture(scope="module")
def workload():
    return CropClassifier(size=32, width=0.25, scenes=[8, 4, 4])


def test_it_is_a_workload(workload):
    check_workload(workload)


@pytest.mark.parametrize(
    ("variant", "params", "macs"), [("small", 2_542_856, 56.5e6), ("large", 5_483_032, 216.6e6)]
)
def test_the_networks_are_the_papers(variant, params, macs):
    """Parameters as torchvision's implementation has them, MACs as the paper rounds them (56 M and 219 M)."""
    network = MobileNetV3(variant, classes=1000).eval()
    assert count_params(network) == params
    assert total_macs(network, {"image": torch.zeros(1, 3, 224, 224)}) == pytest.approx(macs, rel=0.02)


def test_residuals_stand_where_shapes_allow():
    adds = [block.adds for block in MobileNetV3("small").blocks]
    assert adds == [False, False, True, False, True, True, False, True, False, True, True]


@pytest.mark.parametrize(
    ("channels", "round_to", "rounded"), [(16, 8, 16), (10, 8, 16), (18, 8, 24), (72, 16, 80)]
)
def test_channels_are_rounded_but_not_far_down(channels, round_to, rounded):
    assert round_channels(channels, round_to) == rounded


def test_width_scales_every_layer_and_keeps_multiples():
    layers = [m for m in MobileNetV3("large", 1.5, round_to=16).modules() if isinstance(m, nn.Conv2d)]
    assert all(layer.out_channels % 16 == 0 for layer in layers)


def test_loss_falls(workload):
    torch.manual_seed(0)
    network = workload.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    inputs, target = workload.collate([workload.train_data()[i] for i in range(16)])
    losses = []
    for _ in range(15):
        loss = workload.loss({"logits": network(*inputs.values())}, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
