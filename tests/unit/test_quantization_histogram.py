"""Histograms of a layer's input: what they count, how many bins they have, and which ranges come of them."""

import copy
import importlib
import logging

import pytest
import torch
from torch import nn

from jetway.configs.schema import CalibrationMethod
from jetway.tasks import quantization
from jetway.tasks.checkpoint import read_tensors, save_checkpoint
from jetway.tasks.errors import QuantizationError
from jetway.tasks.quantization import CalibrationSection, quantization_record, quantize_network
from jetway.tasks.store import Store
from jetway.tasks.workload import Workload

METHODS = [CalibrationMethod.ENTROPY, CalibrationMethod.PERCENTILE, CalibrationMethod.MSE]
BATCH = 32
MOST_BINS = 2**14


class Rows(Workload):
    """A network of one linear layer or more; its calibration data are the rows given."""

    def __init__(self, rows, network=None):
        self.rows, self.made = rows, network

    def network(self):
        return self.made or nn.Sequential(nn.Linear(self.rows.shape[1], 2))

    def example_inputs(self):
        return {"x": torch.zeros(1, self.rows.shape[1])}

    def calibration_data(self):
        return [({"x": row}, 0) for row in self.rows]

    train_data = evaluation_data = calibration_data

    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs["output"], target)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows, method, *, network=None, percentile=99.9):
    workload = Rows(rows, network)
    section = CalibrationSection(
        calibration=method, percentile=percentile, calibration_samples=len(rows), keep_float=()
    )
    return quantize_network(workload.network(), workload, section)


def input_range(*arguments, **options):
    return float(quantized(*arguments, **options)[0].input_quantizer.amax)


@pytest.fixture(scope="module")
def calibrators():
    """Ours and ModelOpt's."""
    theirs = quantization._modelopt().calib.HistogramCalibrator
    return importlib.import_module("jetway.tasks.histogram").BoundedHistogramCalibrator, theirs


def collected(kind, batches):
    calibrator = kind()
    for batch in batches:
        calibrator.collect(batch.clone())
    return calibrator


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("silent", [1, 3])
def test_batches_of_zeros_may_come_first(method, silent):
    rows = torch.cat([torch.zeros(silent * BATCH, 4), uniform(BATCH, 4)])
    assert 0.8 < input_range(rows, method, percentile=100.0) <= 1.0


def test_zeros_that_came_first_count_in_a_percentile():
    rows = torch.cat([torch.zeros(BATCH, 64), uniform(BATCH, 64)])
    assert input_range(rows, CalibrationMethod.PERCENTILE, percentile=75.0) == pytest.approx(0.5, abs=0.03)
    last = input_range(rows.flip(0), CalibrationMethod.PERCENTILE, percentile=75.0)
    assert input_range(rows, CalibrationMethod.PERCENTILE, percentile=75.0) == last


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-5, 1e-12, 1e-40])
def test_a_first_batch_may_be_tiny(method, scale):
    rows = torch.cat([uniform(BATCH, 64) * scale, uniform(BATCH, 64)])
    network = quantized(rows, method)
    calibrator = network[0].input_quantizer._calibrator
    assert 0.8 < float(network[0].input_quantizer.amax) <= 1.01
    assert calibrator._calib_hist.numel() <= MOST_BINS + 1
    assert calibrator._calib_hist.sum() == rows.numel()


@pytest.mark.parametrize("method", [CalibrationMethod.ENTROPY, CalibrationMethod.PERCENTILE])
@pytest.mark.parametrize("seed", range(4))
def test_ordinary_batches_give_what_modelopt_gives(calibrators, method, seed):
    scales = 0.3 + 2 * uniform(5, seed=seed)
    batches = [(uniform(3, 200, seed=seed + k) - 0.4) * scale for k, scale in enumerate(scales)]
    ours, theirs = (collected(kind, batches) for kind in calibrators)
    assert torch.equal(ours._calib_hist, theirs._calib_hist)
    assert torch.equal(ours._calib_bin_edges, theirs._calib_bin_edges)
    assert torch.equal(*(c.compute_amax(method.value, stride=8) for c in (ours, theirs)))


def test_merged_bins_hold_the_counts_of_their_parts(calibrators):
    small, large = uniform(1000, seed=1), torch.tensor([0.1, 100.0])
    ours, theirs = (collected(kind, [small, large]) for kind in calibrators)
    bins = ours._calib_hist.numel()
    factor = round(float(ours._calib_bin_edges[1] / theirs._calib_bin_edges[1]))
    assert factor == 16
    assert MOST_BINS / 2 < bins <= MOST_BINS
    fine = nn.functional.pad(theirs._calib_hist, (0, bins * factor - theirs._calib_hist.numel()))
    assert torch.equal(ours._calib_hist, fine.reshape(bins, factor).sum(1))
    torch.testing.assert_close(ours._calib_bin_edges, torch.arange(bins + 1) * ours._calib_bin_edges[1])


def test_bins_are_merged_again_and_again(calibrators):
    batches = [uniform(500, seed=k) * 10.0**k for k in range(-6, 7)]
    ours = collected(calibrators[0], batches)
    assert ours._calib_hist.sum() == 13 * 500
    assert ours._calib_hist.numel() <= MOST_BINS + 1
    assert ours._calib_hist[-4:].sum() > 0


def test_a_reset_forgets_the_zeros_too(calibrators):
    calibrator = collected(calibrators[0], [torch.zeros(7)])
    calibrator.reset()
    assert calibrator.compute_amax("percentile") is None
    calibrator.collect(torch.ones(3))
    assert calibrator._calib_hist.sum() == 3


@pytest.mark.parametrize(
    ("first", "second", "edges"),
    [("0x1.218bf6p-1", "0x1.97e1cap-1", 2887), ("0x1.2e9de4p+2", "0x1.2b1b80p+4", 8098)],
    ids=["one too many", "one too few"],
)
@pytest.mark.parametrize("method", METHODS)
def test_modelopt_may_round_to_another_number_of_edges(first, second, edges, method):
    rows = torch.cat([uniform(BATCH, 64) * float.fromhex(scale) for scale in (first, second)])
    rows[0, 0], rows[BATCH, 0] = float.fromhex(first), float.fromhex(second)
    network = quantized(rows, method)
    assert network[0].input_quantizer._calibrator._calib_bin_edges.numel() == edges
    assert 0.5 < float(network[0].input_quantizer.amax) / float.fromhex(second) < 1.001


def test_a_percentile_of_0_is_not_called_an_input_that_is_always_0(caplog):
    rows = torch.zeros(BATCH, 64)
    rows[0, 0] = 1.0
    with caplog.at_level(logging.WARNING, "jetway"):
        quantized(rows, CalibrationMethod.PERCENTILE, percentile=99.0)
    assert "0 stays in float: the percentile of its input is 0" in caplog.text
    assert "always" not in caplog.text


@pytest.mark.parametrize("method", [CalibrationMethod.MAX, *METHODS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(method, value):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight[1, 2] = value
    with pytest.raises(QuantizationError, match="weight of '0' is not finite"):
        quantized(uniform(BATCH, 4), method, network=network)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros_is_quantized(method):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(network[0].weight)
    network = quantized(uniform(BATCH, 4), method, network=network)
    assert torch.isfinite(network(uniform(2, 4))).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_ranges_and_nothing_of_the_histograms(method, tmp_path):
    rows = torch.cat([torch.zeros(BATCH, 4), uniform(BATCH, 4)])
    network = copy.deepcopy(quantized(rows, method))
    store = Store(tmp_path)
    handle = save_checkpoint(store, network, structure=None, quantization=quantization_record(network))
    assert set(read_tensors(store.open(handle))) == {
        "0.weight", "0.bias", "0.input_quantizer._amax", "0.weight_quantizer._amax"
    }  # fmt: skip
