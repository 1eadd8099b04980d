import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jetway.tasks.macs import count_macs, count_params, total_macs, weight_bytes


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        return F.linear(self.inner(x), torch.ones(5, 6)) @ torch.ones(5, 2)


class Sdpa(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("network", "shape", "macs"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 6, 6), 4 * 4 * 8 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (2, 8, 5, 5), 2 * 25 * 8 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 3), 9 * 4 * 6 * 4),
        (nn.Linear(16, 5), (1, 7, 16), 7 * 16 * 5),
        (nn.MultiheadAttention(16, 4, batch_first=True), None, 10 * 16 * 64 + 2 * 10 * 10 * 16),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (1, 10, 16), 13440 + 2 * 10 * 16 * 32),
        (nn.LSTM(16, 8, batch_first=True), (1, 10, 16), 10 * 32 * (16 + 8)),
        (nn.GRU(16, 8, batch_first=True), (1, 10, 16), 10 * 24 * (16 + 8)),
        (Sdpa(), (1, 2, 10, 8), 2 * 2 * 10 * 10 * 8),
        (Functional(), (1, 4), 4 * 6 + 6 * 5 + 5 * 2),
        (nn.BatchNorm2d(8), (1, 8, 4, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_are_those_of_the_formula(network, shape, macs):
    inputs = {"x": torch.ones(shape)} if shape else {k: torch.ones(1, 10, 16) for k in "qkv"}
    assert total_macs(network.eval(), inputs) == macs


def test_macs_by_module_sum_to_the_total():
    network = nn.Sequential(Functional(), nn.Sequential(nn.Linear(2, 3), nn.ReLU())).eval()
    macs = count_macs(network, {"x": torch.ones(1, 4)})
    assert {name: count for name, count in macs.items() if count} == {"0.inner": 24, "0": 40, "1.0": 6}
    assert sum(macs.values()) == total_macs(network, {"x": torch.ones(1, 4)})


def test_a_module_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert count_macs(Twice(), {"x": torch.ones(1, 4)})["layer"] == 32


def test_counting_leaves_the_fused_kernels_as_they_were():
    assert torch.backends.mha.get_fastpath_enabled()
    total_macs(nn.Linear(2, 2), {"x": torch.ones(1, 2)})
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_count_once():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    network.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    assert count_params(network) == 16
    assert weight_bytes(network) == 16 * 4 + 2 * 8
