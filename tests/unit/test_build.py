import onnx
import pytest
import torch
from onnx import TensorProto, helper

from jetway.configs.schema import BuildConfig, Target, TensorRtConfig
from jetway.tasks.artifacts import Engine, OnnxModel, file_sha256
from jetway.tasks.build import build, build_engine
from jetway.tasks.errors import BuildError, TargetMismatchError, TargetUnreachableError
from jetway.tasks.remote import example_inputs, pull_file, push_handle, save_inputs

LOOPBACK = Target(name="loopback", kind="loopback")


def test_engine_comes_back_with_its_passport(deployed):
    lines = []
    deployed.context.progress = lambda *line, **more: lines.append((*line, *more.values()))
    engine = build_engine(
        deployed.context, deployed.session, deployed.onnx, BuildConfig(), variant="baseline-fp32"
    )
    passport = engine.metadata
    assert isinstance(engine, Engine)
    assert engine.parents == (deployed.onnx.sha256,)
    assert file_sha256(deployed.context.store.open(engine)) == passport["engine_sha256"] == engine.sha256
    assert passport["onnx_sha256"] == deployed.onnx.sha256
    assert passport["provenance"]["metadata"] == deployed.onnx.metadata
    assert passport["target"] == "loopback"
    assert not passport["reused"]
    assert {line[0] for line in lines} == {"build baseline-fp32 on loopback"}


def test_the_same_model_is_not_built_twice(deployed):
    first = build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig())
    again = build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig())
    assert again == first
    assert again.metadata["reused"]
    assert again.metadata["build_s"] == first.metadata["build_s"]


def test_a_raised_revision_builds_anew(deployed):
    build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig())
    raised = build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig(revision=2))
    assert not raised.metadata["reused"]


def test_a_build_shows_under_the_name_that_it_ends_with(deployed, monkeypatch):
    monkeypatch.setenv("JETWAY_HOME", str(deployed.home))
    names = set()
    monkeypatch.setattr(deployed.context, "progress", lambda stage, *step: names.add(stage))
    build.fn(
        deployed.context,
        LOOPBACK,
        deployed.onnx,
        BuildConfig(revision=3),
        TensorRtConfig(),
        backend=LOOPBACK.own_backend,
        variant="baseline-fp32",
    )
    assert names == {deployed.context.finished[-1].name}


def test_transfers_of_large_files_are_shown(deployed, monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(deployed.context, "progress", lambda *line: lines.append(line))
    handle = save_inputs(deployed.context, {"image": torch.rand(1_000_000)})
    size = handle.size_bytes
    remote = push_handle(deployed.context, deployed.session, handle, stage="somewhere")
    assert lines[-1] == ("somewhere", size, size, "sending 4.0 MB")
    assert [line[1] for line in lines] == sorted(line[1] for line in lines)
    sent = len(lines)
    path = tmp_path / "back"
    pull_file(deployed.context, deployed.session, remote, path, sha256=handle.sha256, stage="somewhere")
    assert lines[-1] == ("somewhere", size, size, "receiving 4.0 MB")
    assert 1 < sent < len(lines)


def test_transfers_of_small_files_are_not(deployed, monkeypatch):
    lines = []
    monkeypatch.setattr(deployed.context, "progress", lambda *line: lines.append(line))
    push_handle(deployed.context, deployed.session, example_inputs(deployed.context), stage="somewhere")
    assert not lines


def test_threads_of_the_recipe_are_the_sessions(deployed):
    engine = build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig(threads=2))
    assert engine.metadata["options"]["intra_op_num_threads"] == 2


def test_example_inputs_follow_the_seed(deployed):
    assert example_inputs(deployed.context) == example_inputs(deployed.context)


def add_one_node(context, operator, opset=17):
    value = [TensorProto.FLOAT, [1, 1, 12, 12]]
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"], ["y"], name="the_node")],
        "one",
        [helper.make_tensor_value_info("image", *value)],
        [helper.make_tensor_value_info("y", *value)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    with context.store.scratch() as folder:
        onnx.save(model, folder / "one.onnx")
        return context.store.add(OnnxModel, folder / "one.onnx")


def test_an_unsupported_operator_is_a_build_error_with_its_cause(deployed):
    model = add_one_node(deployed.context, "Frobnicate")
    with pytest.raises(BuildError, match=r"Frobnicate.*the_node") as caught:
        build_engine(deployed.context, deployed.session, model, BuildConfig())
    assert caught.value.cause == "unsupported_operator"


def test_an_opset_that_the_target_lacks_is_a_mismatch(deployed):
    model = add_one_node(deployed.context, "Relu", opset=99)
    with pytest.raises(TargetMismatchError, match=r"export\.opset"):
        build_engine(deployed.context, deployed.session, model, BuildConfig())


@pytest.mark.parametrize(("error", "retried"), [(TargetUnreachableError, True), (BuildError, False)])
def test_only_a_lost_connection_is_worth_a_retry(error, retried):
    from prefect.states import exception_to_failed_state
    from prefect.utilities.asyncutils import run_coro_as_sync

    state = run_coro_as_sync(exception_to_failed_state(error("as it happens")))
    assert build.retry_condition_fn(build, None, state) is retried
    assert build.retries == 3
    assert build.retry_delay_seconds == sorted(build.retry_delay_seconds)
