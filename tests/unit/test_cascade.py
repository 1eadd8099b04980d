import numpy as np
import pytest

from jetway.configs.load import load_recipe
from jetway.configs.schema import CascadeConfig
from jetway.flows.pipeline import Observer, classifier_recipe, make_context
from jetway.tasks.artifacts import Report
from jetway.tasks.cascade import check_cascade, sample_count, score
from jetway.tasks.cascade_result import STEPS, VariantCascade
from jetway.tasks.errors import ConfigError
from jetway.tasks.measurement import LatencySummary
from jetway.tasks.results import MEASURED_METRICS
from jetway.tasks.stream_result import Rate
from jetway.tasks.workloads.detector import SceneDetector
from jetway.tasks.workloads.digits import DigitsClassifier
from jetway.tasks.workloads.segmenter import SceneSegmenter


@pytest.fixture
def detector():
    return SceneDetector(size=64, widths=(16, 32, 32), neck=32, scenes=(1, 1, 3))


def test_only_boxes_before_classes_make_a_cascade(detector):
    check_cascade(detector, DigitsClassifier())
    with pytest.raises(ConfigError, match="SceneSegmenter gives masks and DigitsClassifier classes"):
        check_cascade(SceneSegmenter(), DigitsClassifier())
    with pytest.raises(ConfigError, match="gives boxes and SceneDetector boxes"):
        check_cascade(detector, detector)


def test_boxes_with_the_right_labels_score_in_full_and_with_others_nothing(detector):
    data = detector.evaluation_data()
    truths = [data[index][1] for index in range(3)]
    kept = [truth["labels"] >= 0 for truth in truths]
    found = {
        "net.boxes": np.concatenate([t["boxes"][k].numpy() for t, k in zip(truths, kept, strict=True)]),
        "net.labels": np.concatenate([t["labels"][k].numpy() for t, k in zip(truths, kept, strict=True)]),
        "net.frame": np.repeat(np.arange(3), [int(k.sum()) for k in kept]),
    }
    found["net.scores"] = np.ones(len(found["net.labels"]), np.float32)
    assert detector.summarize(score(detector, found, "net", 3))["map50_95"] == pytest.approx(1.0)
    wrong = {**found, "net.labels": (found["net.labels"] + 1) % 10}
    assert detector.summarize(score(detector, wrong, "net", 3))["map50_95"] < 0.5


def test_samples_are_all_unless_fewer_are_asked_for(detector):
    assert sample_count(detector, CascadeConfig(classifier="c")) == 3
    assert sample_count(detector, CascadeConfig(classifier="c", samples=24)) == 3


def test_every_figure_is_a_metric_that_gates_know():
    times = LatencySummary.of(np.full(24, 2_000_000), np.repeat(np.arange(12), 2))
    found = VariantCascade(
        steps=dict.fromkeys((*STEPS, "end_to_end"), times),
        fps=Rate(value=500, interval=(490, 510)),
        scores={"map50_95": 0.5, "map50": 0.7},
        drops={"map50_95": (0.01, (0.0, 0.02)), "map50": (0.0, (0.0, 0.0))},
        objects=3,
        size_bytes=10,
        size_ratio=0.5,
        p50_ratio=0.25,
        records=Report(sha256="0" * 64, size_bytes=1),
    )
    metrics = found.metrics()
    assert set(metrics) <= set(MEASURED_METRICS)
    assert set(found.intervals()) <= set(metrics)
    assert metrics["cascade_map50_95_drop"] == 0.01
    assert metrics["cascade_classify_ms_p50"] == metrics["cascade_ms_p50"] == 2.0


def test_the_recipe_extends_the_detectors_and_names_a_classifier():
    recipe, path = load_recipe("cascade")
    detector, _ = load_recipe("detector")
    assert recipe.train == detector.train
    assert [variant.name for variant in recipe.variants] == ["baseline-fp32", "pruned-int8-qat"]
    classifier, _ = classifier_recipe(recipe, path)
    assert (classifier.name, classifier.variants) == ("cascade-classifier", recipe.variants)
    make_context(recipe, path, Observer())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("extends: missing\n", "missing"),
        ("extends: cascade\n", "extends another recipe itself"),
        ("extends: detector\ngates: ['*: cascade_map50 >= 0.1']\n", "cascade: {classifier: NAME}"),
        ("extends: detector\ncascade: {}\n", "classifier: missing"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path, text, what):
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{text}")
    with pytest.raises(ConfigError, match=what):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_classifier_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: detector\ncascade: {classifier: missing}\n")
    recipe, path = load_recipe(str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match="missing"):
        make_context(recipe, path, Observer())
