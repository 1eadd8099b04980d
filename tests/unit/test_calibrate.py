"""Calibration sets: what the artifact says of them, and which are refused."""

import re

import pytest
import torch

from jetway.configs.schema import QatConfig, Recipe
from jetway.tasks.calibrate import CalibrationSetSection, calibration_sets, describe_calibration_set
from jetway.tasks.calibration import calibration_batches, sample_sha256
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.errors import ConfigError, QuantizationError
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.quantization import load_quantized_network
from jetway.tasks.workload import Workload
from jetway.tasks.workloads.bev_fusion import BevFusionWorkload
from jetway.tasks.workloads.detector import SceneDetector
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier
from jetway.tasks.workloads.segmenter import SceneSegmenter


class Scenes(Workload):
    """Vectors by day and by night; ``leak`` puts evaluation samples among those of the night."""

    labels = ("car", "person", "tram")

    def __init__(self, leak=()):
        self.leak = leak

    def network(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 3))

    def example_inputs(self):
        return {"x": torch.zeros(1, 4)}

    def data(self, seed, count, scale=1.0, labels=3):
        x = scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        return [({"x": row}, index % labels) for index, row in enumerate(x)]

    def train_data(self):
        return self.data(0, 20)

    def calibration_data(self):
        return self.data(1, 10)

    def calibration_sets(self):
        evaluated = self.evaluation_data()
        night = [*self.data(2, 9, scale=5.0, labels=2), *(evaluated[index] for index in self.leak)]
        return {**super().calibration_sets(), "night": night, "none": []}

    def evaluation_data(self):
        return self.data(3, 12)

    def loss(self, outputs, target):
        return torch.nn.functional.cross_entropy(outputs["output"], target)


def section(name="default", samples=100):
    return CalibrationSetSection(calibration_set=name, calibration_samples=samples, revision=1)


@pytest.fixture
def describe(make_context, tmp_path):
    def of(workload, *arguments):
        context = make_context(workload, tmp_path)
        output = describe_calibration_set(context, section(*arguments))
        return context.store.load_json(output.handle), output.metrics

    return of


def test_the_report_counts_scenes_and_names_what_is_missing(describe):
    report, metrics = describe(Scenes(), "night")
    assert report["scenes"] == {"car": 5, "person": 4}
    assert report["scenes_only_in_evaluation"] == ["tram"]
    assert metrics == {"samples": 9.0, "scene_coverage_ratio": pytest.approx(2 / 3)}
    assert describe(Scenes())[1]["scene_coverage_ratio"] == 1.0


def test_the_digest_is_that_of_the_samples_used(describe):
    workload = Scenes()
    whole, again, few = (describe(workload, "default", samples)[0] for samples in (100, 10, 3))
    assert whole["sha256"] == again["sha256"] != few["sha256"]
    assert few["sample_sha256"] == whole["sample_sha256"][:3]
    assert whole["sample_sha256"][0] == sample_sha256(workload.calibration_data()[0][0])


def test_a_sample_is_known_by_its_values_dtype_and_shape():
    x = torch.arange(4.0)
    digests = {sample_sha256({"x": each}) for each in (x, x.double(), x.view(2, 2), x + 1)}
    assert len(digests) == 4
    assert sample_sha256({"x": x, "y": x}) == sample_sha256({"y": x, "x": x.clone()})


SMALL_SCENES = {"scenes": (1, 24, 24)}


@pytest.mark.parametrize(
    ("workload", "scene"),
    [
        (SceneDetector(size=32, **SMALL_SCENES), r"(dark|bright), [1-6] digits"),
        (SceneSegmenter(size=32, **SMALL_SCENES), r"(dark|bright), [1-6] different digits"),
        (CropClassifier(size=16, **SMALL_SCENES), r"(dark|bright), \d"),
        (
            BevFusionWorkload(image_size=(24, 48), cells=8, evaluation_frames=24),
            r"(dark|bright), (nothing|\w+( and \w+)*)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Workload) else "",
)
def test_reference_workloads_tell_their_scenes_apart(describe, workload, scene):
    report, metrics = describe(workload, "default", 24)
    assert len(report["scenes"]) >= 5
    assert sum(report["scenes"].values()) == 24
    assert all(re.fullmatch(scene, name) for name in report["scenes"])
    assert {name.partition(",")[0] for name in report["scenes"]} == {"dark", "bright"}
    assert 0 < metrics["scene_coverage_ratio"] <= 1


def test_sets_of_one_run_have_files_of_their_own(make_context, tmp_path):
    context = make_context(Scenes(), tmp_path)
    files = [describe_calibration_set(context, section(name)).files for name in ("default", "night")]
    assert [list(each) for each in files] == [["default.json"], ["night.json"]]


def test_samples_of_the_evaluation_data_are_refused(describe):
    with pytest.raises(
        QuantizationError,
        match=r"'night' shares 2 of its 11 samples .* 9 is evaluation sample 4, 10 is evaluation",
    ):
        describe(Scenes(leak=(4, 7)), "night")
    describe(Scenes(leak=(4, 7)), "night", 9)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("dusk", ConfigError, r"calibration_sets\(\) has no 'dusk'. It has default, night, none"),
        ("none", QuantizationError, r"Scenes\.calibration_sets\(\)\['none'\] is empty"),
    ],
)
def test_a_set_that_is_unknown_or_empty_says_what_to_do(describe, name, error, message):
    with pytest.raises(error, match=message):
        describe(Scenes(), name)


def test_ranges_come_from_the_named_set(make_context, tmp_path):
    context = make_context(Scenes(), tmp_path)
    checkpoint = save_checkpoint(context.store, context.workload.network(), structure=None)
    ranges = {}
    for name in ("default", "night"):
        handle = quantize_ptq(context, checkpoint, QatConfig(calibration_set=name)).handle
        network = load_quantized_network(context.workload, handle, context.store)
        ranges[name] = float(network[0].input_quantizer.amax)
        largest = max(float(inputs["x"].abs().max()) for inputs in calibration_batches(Scenes(), 50, name))
        assert ranges[name] == pytest.approx(largest)
    assert ranges["night"] > 2 * ranges["default"]


def test_a_recipe_uses_the_sets_of_its_int8_variants():
    def sets(*variants, **changes):
        recipe = Recipe(
            name="r", workload={"class_path": "a:B"}, variants=("baseline-fp32", *variants), **changes
        )
        return [(each.calibration_set, each.calibration_samples) for each in calibration_sets(recipe)]

    assert sets() == sets("baseline-fp16", "baseline-int8-dynamic") == []
    assert sets("baseline-int8-ptq", qat={"calibration_set": "night"}) == [("night", 128)]
    assert sets("baseline-int8-ptq", "baseline-int8-calibrated") == [("default", 128)]
