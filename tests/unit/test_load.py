import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jetway.configs.schema import FinetuneConfig, PruneConfig, TrainConfig
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.errors import ArtifactError, ConfigError, WorkloadError
from jetway.tasks.load import checkpoint_input, load, load_baseline
from jetway.tasks.prune import prune_network
from jetway.tasks.training import evaluate


@pytest.fixture
def context(small_workload, make_context, tmp_path):
    return make_context(small_workload(), tmp_path, reuse=True)


@pytest.fixture
def network(context):
    torch.manual_seed(3)
    return context.workload.network().eval()


def assert_loads(context, path, network):
    output = load_baseline(context, path, None)
    loaded = load_network(context.workload, output.handle, context.store)
    x = context.workload.example_inputs()["x"]
    assert torch.equal(loaded(x), network(x))
    assert output.metrics == evaluate(context.workload, network)


def test_load_safetensors(context, network, tmp_path):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert_loads(context, tmp_path / "w.safetensors", network)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_load_a_state_dict(context, network, tmp_path, suffix, zipped):
    path = tmp_path / f"w.{suffix}"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert_loads(context, path, network)


def test_load_a_pruned_checkpoint_of_an_earlier_run(context, network, tmp_path):
    baseline = save_checkpoint(context.store, network, structure=None)
    pruned = prune_network(context, baseline, PruneConfig(), FinetuneConfig()).handle
    path = tmp_path / "pruned.safetensors"
    path.write_bytes(context.store.open(pruned).read_bytes())
    assert_loads(context, path, load_network(context.workload, pruned, context.store))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_unread(context, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.ones(1), "hook": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"never unpickles code\. .*safetensors\.torch\.save_file"):
        load_baseline(context, path, None)
    assert not (tmp_path / "executed").exists()


def test_a_bare_pickle_and_a_whole_module_are_refused(context, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload()))
    torch.save(network, tmp_path / "module.pt")
    for name in ("bare.pt", "module.pt"):
        with pytest.raises(ArtifactError, match="safetensors"):
            load_baseline(context, tmp_path / name, None)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", "half"], ids=["empty", "text", "half"])
def test_a_damaged_file_is_an_artifact_error(context, network, tmp_path, name, content):
    path = tmp_path / name
    if content == "half":
        save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(
            network.state_dict(), path
        )
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=str(path)):
        load_baseline(context, path, None)


def test_a_training_checkpoint_says_what_it_holds(context, network, tmp_path):
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"holds a dict with \['epoch', 'state_dict'\]"):
        load_baseline(context, tmp_path / "w.pt", None)


def test_weights_of_another_network_name_the_keys(context, tmp_path):
    save_file({"classifier.weight": torch.ones(5, 3), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ArtifactError, match=r"missing: stem\.0\.weight.*unexpected: extra.*other shape: classifier"
    ):
        load_baseline(context, tmp_path / "w.safetensors", None)


def test_a_quantized_checkpoint_is_no_baseline(context, network, tmp_path):
    handle = save_checkpoint(context.store, network, structure=None, quantization={})
    with pytest.raises(ArtifactError, match="is quantized"):
        load_baseline(context, context.store.open(handle), None)


def test_a_missing_file_is_a_config_error(context, tmp_path):
    with pytest.raises(ConfigError, match=r"workload\.checkpoint: there is no file"):
        load_baseline(context, tmp_path / "gone.safetensors", None)


def test_another_kind_of_file_is_a_config_error(context, tmp_path):
    (tmp_path / "w.h5").touch()
    with pytest.raises(ConfigError, match=r"neither \.safetensors nor \.pt"):
        load_baseline(context, tmp_path / "w.h5", None)


def test_neither_checkpoint_nor_train_is_a_config_error(context):
    with pytest.raises(ConfigError, match="add a train section"):
        load_baseline(context, None, None)


def test_a_network_that_fails_is_a_workload_error(context):
    context.workload.example_inputs = lambda: {"x": torch.ones(1, 4, 8, 8)}
    with pytest.raises(WorkloadError, match="fails on its own example_inputs"):
        load_baseline(context, None, TrainConfig())


def test_a_missing_baseline_is_trained(context):
    torch.manual_seed(0)
    output = load_baseline(context, None, TrainConfig(epochs=2))
    history = context.store.load_json(output.files["train_history.json"])
    assert [epoch["epoch"] for epoch in history["history"]] == [0, 1, 2]
    network = load_network(context.workload, output.handle, context.store)
    assert evaluate(context.workload, network) == output.metrics


def test_training_shows_under_the_name_that_it_ends_with(context, monkeypatch):
    names = set()
    monkeypatch.setattr(context, "progress", lambda stage, *step: names.add(stage))
    load.fn(context, None, TrainConfig(epochs=1))
    assert names == {context.finished[-1].name} == {"load"}


def test_the_stage_is_redone_when_the_file_changes_and_only_then(context, network, tmp_path):
    path = tmp_path / "w.safetensors"
    cached = []
    for weights in (network, network, context.workload.network()):
        save_file(weights.state_dict(), path)
        load.fn(context, path, TrainConfig(epochs=5))
        cached.append(context.finished[-1].cached)
    assert cached == [False, True, False]


def test_the_stage_is_redone_when_training_changes(context):
    cached = []
    for epochs in (1, 1, 2):
        load.fn(context, None, TrainConfig(epochs=epochs))
        cached.append(context.finished[-1].cached)
    assert cached == [False, True, False]


def test_training_the_stage_twice_gives_the_same_checkpoint(context, make_context, tmp_path):
    first = load.fn(context, None, TrainConfig(epochs=1))
    again = make_context(context.workload, tmp_path, reuse=True)
    assert load.fn(again, None, TrainConfig(epochs=1)).handle == first.handle
    assert not again.finished[-1].cached


def test_the_input_handle_is_the_files_content(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    save_file(network.state_dict(), tmp_path / "b.safetensors")
    assert checkpoint_input(tmp_path / "a.safetensors") == checkpoint_input(tmp_path / "b.safetensors")
