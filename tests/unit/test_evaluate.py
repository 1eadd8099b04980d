from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from jetway.configs.schema import BuildConfig, EvaluateConfig, Target
from jetway.tasks import evaluate as stage
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.build import build_engine
from jetway.tasks.errors import ArtifactError, TargetMismatchError, WorkloadError
from jetway.tasks.evaluate import evaluate, evaluate_engine, export_inputs
from jetway.tasks.workload import evaluate_network

LOOPBACK = Target(name="loopback", kind="loopback")


@pytest.fixture
def engine(deployed):
    return build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig())


def test_score_is_that_of_the_network_on_the_host(deployed, engine):
    found = evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig())
    records = deployed.context.store.load_json(found.records)
    assert records == evaluate_network(deployed.context.workload, deployed.context.workload.trained)
    assert found.metrics == {"top1": pytest.approx(24 / 30)}
    assert found.samples == 30
    inputs = export_inputs(deployed.context, EvaluateConfig())
    assert found.records.parents == (engine.sha256, *(chunk.sha256 for chunk in inputs))


def test_an_evaluation_shows_under_the_name_that_it_ends_with(deployed, engine, monkeypatch):
    monkeypatch.setenv("JETWAY_HOME", str(deployed.home))
    names = set()
    monkeypatch.setattr(deployed.context, "progress", lambda stage, *step: names.add(stage))
    evaluate.fn(deployed.context, LOOPBACK, engine, EvaluateConfig(), variant="baseline-fp32")
    assert names == {deployed.context.finished[-1].name}


def test_samples_of_different_shapes_are_the_workloads_error(deployed, engine, monkeypatch):
    def evaluation_data():
        return [({"image": torch.ones(1, 12, 12 + i // 4), "offset": torch.ones(())}, 0) for i in range(8)]

    monkeypatch.setattr(deployed.context.workload, "evaluation_data", evaluation_data)
    with pytest.raises(WorkloadError, match=r"'image' as \[1, 1, 12, 12\] .* \[1, 1, 12, 13\].*Pad"):
        evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig())


def test_the_recipe_may_take_fewer_samples(deployed, engine):
    found = evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig(samples=7))
    assert found.samples == 7


def test_inputs_are_split_into_files_and_joined_again(deployed, engine, monkeypatch):
    monkeypatch.setattr(stage, "FILE_BYTES", 4000)
    inputs = export_inputs(deployed.context, EvaluateConfig())
    assert len(inputs) > 3
    arrays = [load_file(deployed.context.store.open(handle)) for handle in inputs]
    images = np.concatenate([array["image"] for array in arrays])
    data = deployed.context.workload.evaluation_data()
    np.testing.assert_array_equal(images, torch.stack([sample["image"] for sample, _ in data]).numpy())
    found = evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig(), inputs=inputs)
    assert found.metrics["top1"] == pytest.approx(24 / 30)


def test_inputs_are_the_same_files_every_time(deployed):
    assert export_inputs(deployed.context, EvaluateConfig()) == export_inputs(
        deployed.context, EvaluateConfig()
    )


def test_a_corrupt_engine_on_the_target_is_never_scored(deployed, engine):
    path = Path(engine.metadata["remote_path"])
    sound = path.read_bytes()
    path.write_bytes(sound[:-100] + bytes(byte ^ 1 for byte in sound[-100:]))
    with pytest.raises(ArtifactError, match="corrupt"):
        evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig())
    path.write_bytes(sound)


def test_an_engine_of_another_machine_is_refused(deployed, engine):
    sidecar = Path(engine.metadata["remote_path"] + ".json")
    sound = sidecar.read_text()
    sidecar.write_text(sound.replace('"engine_version": "', '"engine_version": "0.'))
    with pytest.raises(TargetMismatchError, match="engine_version"):
        evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig())
    sidecar.write_text(sound)


def test_another_engine_has_another_score(deployed, engine):
    """Accuracy comes from the engine: one with its classes swapped is wrong where the other was right."""
    model = onnx.load(deployed.context.store.open(deployed.onnx))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("head."):
            swapped = numpy_helper.to_array(tensor)[::-1].copy()
            tensor.CopyFrom(numpy_helper.from_array(swapped, tensor.name))
    with deployed.context.store.scratch() as folder:
        onnx.save(model, folder / "swapped.onnx")
        handle = deployed.context.store.add(OnnxModel, folder / "swapped.onnx")
    swapped = build_engine(deployed.context, deployed.session, handle, BuildConfig())
    found = evaluate_engine(deployed.context, deployed.session, swapped, EvaluateConfig())
    assert found.metrics["top1"] < 0.5


def test_a_failing_score_is_the_workloads_error(deployed, engine, monkeypatch):
    def score_sample(outputs, target):
        return {"top1": outputs["no such output"]}

    monkeypatch.setattr(deployed.context.workload, "score_sample", score_sample)
    with pytest.raises(WorkloadError, match=r"score_sample.*logits"):
        evaluate_engine(deployed.context, deployed.session, engine, EvaluateConfig(samples=2))
