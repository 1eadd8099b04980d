"""Quantizers: where they go, what ranges they get, and that they come back from a checkpoint."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from jetway.configs.schema import CalibrationMethod
from jetway.tasks.checkpoint import checkpoint_record, load_network, save_checkpoint
from jetway.tasks.errors import ArtifactError, ConfigError, QuantizationError
from jetway.tasks.quantization import (
    CalibrationSection,
    load_quantized_network,
    quantization_record,
    quantize_network,
)
from jetway.tasks.store import Store
from jetway.tasks.workload import Workload
from jetway.tasks.workloads.digits import DigitsClassifier

SMALL = {"size": 16, "widths": (16, 16, 32), "blocks": 1}


def section(**changes):
    values = {"calibration": CalibrationMethod.MAX, "percentile": 99.9, "calibration_samples": 32}
    return CalibrationSection(**(values | {"keep_float": ()} | changes))


def enabled(network):
    return set(quantization_record(network)["quantizers"])


class Vectors(Workload):
    """Two layers on vectors; calibration vectors are 1.0 but for one value."""

    def __init__(self, samples=100, outlier=10.0, network=None):
        self.samples, self.outlier, self.made = samples, outlier, network

    def network(self):
        return self.made or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def example_inputs(self):
        return {"x": torch.zeros(1, 4)}

    def calibration_data(self):
        data = [({"x": torch.ones(4)}, 0) for _ in range(self.samples)]
        if data:
            data[0] = ({"x": torch.tensor([self.outlier, 1.0, 1.0, 1.0])}, 0)
        return data

    train_data = evaluation_data = calibration_data

    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs["output"], target)


def test_quantize_network_gives_each_layer_an_input_and_a_weight_quantizer():
    workload = DigitsClassifier(**SMALL)
    network = quantize_network(workload.network(), workload, section())
    layers = [name for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert enabled(network) == {f"{name}.{kind}_quantizer" for name in layers for kind in ("input", "weight")}
    assert network.stem[0].weight_quantizer.amax.numel() == 16
    assert network.stem[0].input_quantizer.amax.numel() == 1
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == len(layers) - 1


def test_quantize_network_changes_the_outputs_a_little():
    workload = DigitsClassifier(**SMALL)
    network, x = workload.network().eval(), torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        before = network(x)
        after = quantize_network(network, workload, section())(x)
    error = float((after - before).abs().max() / before.abs().max())
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize(
    ("changes", "lowest", "highest"),
    [
        ({"calibration": CalibrationMethod.MAX}, 10.0, 10.0),
        ({"calibration": CalibrationMethod.PERCENTILE, "percentile": 99.0}, 0.99, 1.05),
        ({"calibration": CalibrationMethod.ENTROPY}, 0.9, 10.0),
        ({"calibration": CalibrationMethod.MSE}, 0.9, 10.1),
        ({"calibration": CalibrationMethod.MAX, "calibration_samples": 1}, 10.0, 10.0),
    ],
    ids=["max", "percentile", "entropy", "mse", "one sample"],
)
def test_calibration_sets_the_input_range(changes, lowest, highest):
    workload = Vectors()
    network = quantize_network(
        workload.network(), workload, section(**({"calibration_samples": 100} | changes))
    )
    assert lowest <= float(network[0].input_quantizer.amax) <= highest


def test_calibration_uses_no_more_samples_than_asked():
    workload = Vectors(outlier=1.0)
    late = workload.calibration_data()
    late[60] = ({"x": torch.full((4,), 50.0)}, 0)
    workload.calibration_data = lambda: late
    few = quantize_network(workload.network(), workload, section(calibration_samples=60))
    all_of_them = quantize_network(workload.network(), workload, section(calibration_samples=100))
    assert float(few[0].input_quantizer.amax) == 1.0
    assert float(all_of_them[0].input_quantizer.amax) == 50.0


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("stem.0", {"stem.0"}),
        ("stem", {"stem.0"}),
        ("*.first", {"middle.1.first.0", "deep.1.first.0"}),
        ("classifier", {"classifier"}),
    ],
)
def test_keep_float_takes_names_globs_and_containers(pattern, kept):
    workload = DigitsClassifier(**SMALL)
    everything = enabled(quantize_network(workload.network(), workload, section()))
    rest = enabled(quantize_network(workload.network(), workload, section(keep_float=(pattern,))))
    assert {name.rpartition(".")[0] for name in everything - rest} == kept


def test_keep_float_names_the_nearest_module():
    workload = DigitsClassifier(**SMALL)
    with pytest.raises(ConfigError, match=r"qat\.keep_float.*'clasifier'.*classifier"):
        quantize_network(workload.network(), workload, section(keep_float=("clasifier",)))


def test_quantize_network_refuses_to_quantize_nothing():
    workload = Vectors()
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        quantize_network(workload.network(), workload, section(keep_float=("*",)))


def test_quantize_network_asks_for_calibration_data():
    workload = Vectors(samples=0)
    with pytest.raises(QuantizationError, match=r"Vectors\.calibration_data\(\) is empty"):
        quantize_network(workload.network(), workload, section())


@pytest.mark.parametrize("method", [CalibrationMethod.MAX, CalibrationMethod.PERCENTILE])
def test_quantize_network_names_the_layer_whose_input_is_not_finite(method):
    workload = Vectors(outlier=float("inf"))
    with pytest.raises(QuantizationError, match="'0'"):
        quantize_network(workload.network(), workload, section(calibration=method))


class Idle(nn.Module):
    """Has a layer that forward does not call, and one whose input is always zero."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.silent = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) + self.silent(torch.zeros_like(x))


@pytest.mark.parametrize("method", [m for m in CalibrationMethod if m is not CalibrationMethod.SMOOTHQUANT])
def test_a_layer_without_a_range_stays_in_float(method, caplog):
    workload = Vectors(network=Idle())
    with caplog.at_level(logging.WARNING, "jetway"):
        chosen = section(calibration=method, calibration_samples=100)
        network = quantize_network(workload.network(), workload, chosen)
    assert enabled(network) == {"used.input_quantizer", "used.weight_quantizer"}
    assert "unused stays in float: it is not used" in caplog.text
    assert "silent stays in float: its input is always 0" in caplog.text


def test_mse_finds_the_range_of_the_least_squared_error():
    x = torch.rand(8000, 4, generator=torch.Generator().manual_seed(0))
    x[5, 2] = 10.0

    class Spread(Vectors):
        def calibration_data(self):
            return [({"x": row}, 0) for row in x]

    chosen = section(calibration=CalibrationMethod.MSE, calibration_samples=len(x))
    network = quantize_network(Spread().network(), Spread(), chosen)
    found = float(network[0].input_quantizer.amax)

    def error(largest):
        step = largest / 127
        return float(((x / step).round().clamp(-127, 127) * step - x).square().sum())

    candidates = [float(x.abs().max()) * share / 100 for share in range(5, 101)]
    assert error(found) < 1.02 * min(map(error, candidates))
    assert found < 0.95 * float(x.abs().max())


def test_smoothquant_wants_a_layer_norm():
    workload = Vectors()
    with pytest.raises(QuantizationError, match="smoothquant finds nothing to smooth"):
        quantize_network(workload.network(), workload, section(calibration=CalibrationMethod.SMOOTHQUANT))


def test_transposed_convolutions_have_their_output_channels_on_axis_1():
    class Images(Vectors):
        def calibration_data(self):
            return [({"x": torch.randn(3, 4, 4)}, 0) for _ in range(4)]

    workload = Images(network=nn.ConvTranspose2d(3, 5, 2))
    network = quantize_network(nn.Sequential(workload.network()), workload, section())
    assert network[0].weight_quantizer.amax.shape == (1, 5, 1, 1)


def test_quantize_network_says_nothing_on_the_terminal(capfd):
    workload = Vectors()
    quantize_network(workload.network(), workload, section())
    assert capfd.readouterr() == ("", "")


def test_a_transformer_layer_runs_through_its_quantizers():
    """PyTorch's fused kernel for inference would read the weights past them."""

    class Tokens(Vectors):
        def calibration_data(self):
            return [({"x": torch.randn(6, 8)}, 0) for _ in range(4)]

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    network = quantize_network(nn.Sequential(layer), Tokens(network=layer), section())
    assert {"0.linear1.input_quantizer", "0.linear2.input_quantizer"} <= enabled(network)


RELOAD = """
import sys, torch
from pathlib import Path
from jetway.tasks.artifacts import Checkpoint
from jetway.tasks.quantization import load_quantized_network
from jetway.tasks.store import Store
from jetway.tasks.workloads.digits import DigitsClassifier
torch.set_num_threads(1)
workload = DigitsClassifier(size=16, widths=(16, 16, 32), blocks=1)
checkpoint = Checkpoint.model_validate_json(sys.argv[2])
network = load_quantized_network(workload, checkpoint, Store(Path(sys.argv[1])))
images = torch.stack([workload.evaluation_data()[i][0]["image"] for i in range(8)])
with torch.no_grad():
    print(network(images).double().tolist())
"""


def test_a_quantized_checkpoint_reloads_in_a_fresh_process_to_the_same_outputs(tmp_path):
    workload, store = DigitsClassifier(**SMALL), Store(tmp_path)
    network = quantize_network(workload.network(), workload, section(keep_float=("stem",)))
    handle = save_checkpoint(
        store, network, structure=None, quantization=quantization_record(network), metadata={"a": 1}
    )
    images = torch.stack([workload.evaluation_data()[i][0]["image"] for i in range(8)])
    with torch.no_grad():
        expected = network(images)

    fresh = subprocess.run(
        [sys.executable, "-W", "error", "-c", RELOAD, str(tmp_path), handle.model_dump_json()],
        check=True, capture_output=True, text=True,
    )  # fmt: skip

    assert fresh.stderr == ""
    assert torch.equal(torch.tensor(json.loads(fresh.stdout), dtype=torch.float64), expected.double())
    assert enabled(load_quantized_network(workload, handle, store)) == enabled(network)


def test_the_two_kinds_of_checkpoint_are_told_apart(tmp_path):
    workload, store = Vectors(), Store(tmp_path)
    floating = save_checkpoint(store, workload.network(), structure=None)
    network = quantize_network(workload.network(), workload, section())
    quantized = save_checkpoint(store, network, structure=None, quantization=quantization_record(network))
    with pytest.raises(ArtifactError, match="not quantized"):
        load_quantized_network(workload, floating, store)
    with pytest.raises(ArtifactError, match="is quantized"):
        load_network(workload, quantized, store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"quantizers": {"absent.input_quantizer": {"axis": None}}}, "absent"),
        ({"quantizers": {"2.output_quantizer": {"axis": None}}}, "output_quantizer"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, change, message):
    workload, store = Vectors(), Store(tmp_path)
    network = quantize_network(workload.network(), workload, section())
    record = quantization_record(network) | change
    handle = save_checkpoint(store, network, structure=None, quantization=record)
    assert checkpoint_record(store.open(handle)).quantization == record
    with pytest.raises(ArtifactError, match=message):
        load_quantized_network(workload, handle, store)
