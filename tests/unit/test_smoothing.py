"""SmoothQuant: which layers it finds, that the float network stays, and that int8 gains by it."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import CalibrationMethod
from jetway.tasks.quantization import CalibrationSection, quantize_network
from jetway.tasks.smoothing import smooth_linear_layers


@pytest.fixture
def make(small_workload):
    def with_outliers(name):
        """A network whose LayerNorms give three channels fifty times as much as the others."""
        workload = small_workload(network=name)
        network = workload.network().eval()
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                with torch.no_grad():
                    module.weight[:3] *= 50
        for linear in (m for m in network.modules() if isinstance(m, nn.Linear) and m.in_features == 32):
            with torch.no_grad():
                linear.weight[:, :3] /= 50
        return workload, network

    return with_outliers


def inputs_of(workload):
    return [{"x": workload.calibration_data().inputs}]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Vit", {"attn.qkv", "mlp.0"}),
        ("VitSeparate", {"attn.q", "attn.k", "attn.v", "mlp.0"}),
        ("Swin", {f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn.qkv", "mlp.0")}),
        ("Residual", set()),
    ],
)
def test_linear_layers_behind_a_layer_norm_are_smoothed_and_the_network_stays(make, name, layers):
    workload, network = make(name)
    x = workload.evaluation_data().inputs[:8]
    before = network(x)
    found = set(smooth_linear_layers(network, inputs_of(workload), workload.output_names))
    assert found - {"head"} == layers
    assert torch.allclose(network(x), before, rtol=1e-3, atol=1e-3)


def test_smoothing_evens_out_what_a_layer_takes(make):
    workload, network = make("Swin")

    def spread():
        seen = []
        hook = network.blocks[0].attn.qkv.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        with torch.no_grad():
            network(workload.calibration_data().inputs)
        hook.remove()
        largest = seen[0].abs().flatten(0, 1).amax(0)
        return float(largest.max() / largest.median())

    before = spread()
    smooth_linear_layers(network, inputs_of(workload), workload.output_names)
    assert spread() < before / 3


def test_smoothquant_is_nearer_to_the_float_network_than_max(make):
    errors = {}
    for method in (CalibrationMethod.MAX, CalibrationMethod.SMOOTHQUANT):
        torch.manual_seed(0)
        workload, network = make("Swin")
        x = workload.evaluation_data().inputs
        with torch.no_grad():
            expected = network(x)
            section = CalibrationSection(
                calibration=method, percentile=99.9, calibration_samples=16, keep_float=()
            )
            errors[method] = float(
                (quantize_network(network, workload, section)(x) - expected).square().mean()
            )
    assert errors[CalibrationMethod.SMOOTHQUANT] < 0.5 * errors[CalibrationMethod.MAX]


class Shared(nn.Module):
    """What the LayerNorm gives goes to a linear layer and past it."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return y + self.linear(y)


def test_a_layer_norm_that_something_else_reads_too_is_left_alone():
    network, x = Shared().eval(), torch.randn(4, 3, 8)
    before, weight = network(x), network.norm.weight.clone()
    assert smooth_linear_layers(network, [{"x": x}], ["y"]) == []
    assert torch.allclose(network.norm.weight, weight)
    assert torch.allclose(network(x), before, atol=1e-5)
