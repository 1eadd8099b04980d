import pytest
import torch

from jetway.configs.schema import DistillationConfig, FinetuneConfig, PruneConfig, TrainConfig
from jetway.tasks.checkpoint import checkpoint_record, load_network
from jetway.tasks.errors import ConfigError
from jetway.tasks.finetune import finetune, finetune_network
from jetway.tasks.load import load_baseline
from jetway.tasks.prune import prune_network
from jetway.tasks.training import evaluate


@pytest.fixture(scope="module")
def trained(small_workload, make_context, tmp_path_factory):
    """A context, a trained baseline and the same pruned."""
    context = make_context(small_workload(), tmp_path_factory.mktemp("finetune"))
    torch.manual_seed(0)
    baseline = load_baseline(context, None, TrainConfig(epochs=6, batch_size=16, learning_rate=3e-3))
    pruned = prune_network(context, baseline.handle, PruneConfig(), FinetuneConfig())
    return context, baseline, pruned


def test_finetune_gains_and_keeps_the_structure(trained):
    context, _, pruned = trained
    output = finetune_network(
        context, pruned.handle, FinetuneConfig(epochs=5, batch_size=16, learning_rate=3e-3), None
    )
    assert output.metrics["top1"] > pruned.metrics["top1"]
    path, before = context.store.open(output.handle), context.store.open(pruned.handle)
    assert checkpoint_record(path).structure == checkpoint_record(before).structure
    network = load_network(context.workload, output.handle, context.store)
    assert evaluate(context.workload, network) == output.metrics
    history = context.store.load_json(output.files["finetune_history.json"])
    assert history["history"][0]["metrics"] == {"top1": pruned.metrics["top1"]}
    assert output.handle.parents == (pruned.handle.sha256,)


def test_finetune_with_distillation_names_its_teacher(trained):
    context, baseline, pruned = trained
    config = FinetuneConfig(epochs=1, distillation=DistillationConfig())
    output = finetune_network(context, pruned.handle, config, baseline.handle)
    assert output.handle.parents == (pruned.handle.sha256, baseline.handle.sha256)
    plain = finetune_network(context, pruned.handle, FinetuneConfig(epochs=1), baseline.handle)
    tables = [context.store.load_json(each.files["finetune_history.json"]) for each in (output, plain)]
    losses = [table["history"][1]["loss"] for table in tables]
    assert losses[0] != losses[1]
    assert plain.handle.parents == (pruned.handle.sha256,)


def test_finetune_with_distillation_needs_a_teacher(trained):
    context, _, pruned = trained
    with pytest.raises(ConfigError, match=r"finetune\.distillation is set"):
        finetune_network(context, pruned.handle, FinetuneConfig(distillation=DistillationConfig()), None)


def test_no_epochs_hand_on_the_pruned_weights(trained):
    context, _, pruned = trained
    output = finetune_network(context, pruned.handle, FinetuneConfig(epochs=0), None)
    assert output.handle.sha256 == pruned.handle.sha256
    assert output.metrics == {"top1": pruned.metrics["top1"]}


def test_the_teacher_is_part_of_the_key_only_where_it_teaches(trained, make_context):
    context, baseline, pruned = trained
    context = make_context(context.workload, context.store.root.parent, reuse=True)
    taught = FinetuneConfig(epochs=0, distillation=DistillationConfig())
    plain = FinetuneConfig(epochs=0)
    for config, teacher in [(plain, baseline), (plain, pruned), (taught, baseline), (taught, pruned)]:
        finetune.fn(context, pruned.handle, config, teacher.handle)
    assert [stage.cached for stage in context.finished] == [False, True, False, False]
