import pytest
import torch

from jetway.configs.schema import FinetuneConfig, QatConfig
from jetway.tasks.artifacts import Report, StageOutput
from jetway.tasks.stage import StageContext, run_stage, stage_key


@pytest.fixture
def context(make_context, tmp_path):
    return make_context(None, tmp_path, reuse=True, workload_digest="w", seed=3)


def report(context, value):
    return StageOutput(handle=context.store.add_json(value))


def test_same_content_runs_once(context):
    runs = []

    def produce(own):
        runs.append(own.work_dir)
        return report(context, "result")

    first = run_stage(context, "qat", produce, inputs=[], section=QatConfig())
    again = run_stage(context, "qat", produce, inputs=[], section=QatConfig())
    assert first == again
    assert len(runs) == 1
    assert [stage.cached for stage in context.finished] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: stage_key(c, "qat", [], QatConfig(epochs=9)),
        lambda c: stage_key(c, "qat", [], QatConfig(revision=2)),
        lambda c: stage_key(c, "finetune", [], QatConfig()),
        lambda c: stage_key(c, "qat", [Report(sha256="a" * 64, size_bytes=1)], QatConfig()),
        lambda c: stage_key(StageContext(None, c.store, workload_digest="x", seed=3), "qat", [], QatConfig()),
        lambda c: stage_key(StageContext(None, c.store, workload_digest="w", seed=4), "qat", [], QatConfig()),
    ],
    ids=["section", "revision", "stage", "input", "workload", "seed"],
)
def test_key_changes_with(context, change):
    assert change(context) != stage_key(context, "qat", [], QatConfig())


def test_key_ignores_where_a_file_lies(context):
    handle = Report(sha256="a" * 64, size_bytes=1)
    moved = handle.model_copy(update={"uri": "file:///elsewhere"})
    section = FinetuneConfig()
    assert stage_key(context, "x", [handle], section) == stage_key(context, "x", [moved], section)


def test_failed_stage_is_not_recorded_and_keeps_its_work_folder(context):
    def produce(own):
        own.work_dir.mkdir(parents=True)
        (own.work_dir / "epoch-3").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_stage(context, "qat", produce, inputs=[], section=QatConfig())
    assert context.index.outputs == {}
    kept = []
    run_stage(
        context,
        "qat",
        lambda own: kept.extend(own.work_dir.iterdir()) or report(context, 1),
        inputs=[],
        section=QatConfig(),
    )
    assert [path.name for path in kept] == ["epoch-3"]
    assert not kept[0].exists()


def test_seed_of_a_stage_does_not_depend_on_what_ran_before(context):
    def draw(stage):
        return lambda own: report(context, torch.rand(2).tolist())

    values = [
        context.store.load_json(
            run_stage(context, "a", draw("a"), inputs=[], section=QatConfig(revision=i)).handle
        )
        for i in (1, 2)
    ]
    assert values[0] == values[1]
