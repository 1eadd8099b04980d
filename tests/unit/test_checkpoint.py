import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jetway.tasks.artifacts import Checkpoint
from jetway.tasks.checkpoint import (
    CheckpointRecord,
    checkpoint_record,
    load_network,
    load_weights,
    network_tensors,
    read_tensors,
    save_checkpoint,
)
from jetway.tasks.errors import ArtifactError, WorkloadError
from jetway.tasks.store import Store
from jetway.tasks.structure import describe_structure


class Network(nn.Module):
    """Shared weights, an integer buffer, a buffer outside the state dict, a transposed weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("noise", torch.rand(8), persistent=False)
        self.mix = nn.Parameter(torch.rand(8, 4).t())

    def forward(self, x):
        return self.head(self.norm(self.embed(x)[:, self.order] + self.noise)), self.mix.sum()


class Workload:
    def network(self):
        return Network()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_checkpoint_gives_the_same_network_back(store):
    network = Network().eval()
    handle = save_checkpoint(
        store, network, structure=None, parents=("a" * 64,), metadata={"stage": "baseline"}
    )
    copy = load_network(Workload(), handle, store)
    x = torch.arange(10)
    assert torch.equal(copy(x)[0], network(x)[0])
    assert copy.head.weight is copy.embed.weight
    assert not copy.training
    assert copy.order.dtype == torch.int64
    assert (handle.parents, handle.metadata) == (("a" * 64,), {"stage": "baseline"})


def test_shared_tensors_are_stored_once(store):
    tensors = read_tensors(store.open(save_checkpoint(store, Network(), structure=None)))
    assert "embed.weight" in tensors
    assert "head.weight" not in tensors


def test_the_same_weights_make_the_same_file(store):
    network = Network()
    structure = describe_structure(Network(), network)
    first, second = (save_checkpoint(store, network, structure=structure) for _ in range(2))
    assert first == second


def test_records_are_read_from_the_file_itself(store):
    handle = save_checkpoint(store, Network(), structure={"schema_version": 1}, quantization={"bits": 8})
    assert checkpoint_record(store.open(handle)) == CheckpointRecord(
        structure={"schema_version": 1}, quantization={"bits": 8}
    )


def test_a_plain_file_of_weights_has_empty_records(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert checkpoint_record(tmp_path / "plain.safetensors") == CheckpointRecord()


def test_a_foreign_record_is_an_artifact_error(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"jetway": '{"schema_version": 7}'})
    with pytest.raises(ArtifactError, match="not a checkpoint record"):
        checkpoint_record(tmp_path / "x.safetensors")


def test_a_quantized_checkpoint_is_refused_by_name(store):
    handle = save_checkpoint(store, Network(), structure=None, quantization={})
    with pytest.raises(ArtifactError, match=r"quantization\.load_quantized_network"):
        load_network(Workload(), handle, store)


def test_a_damaged_file_is_an_artifact_error(tmp_path, store):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    for read in (read_tensors, checkpoint_record):
        with pytest.raises(ArtifactError, match="not a whole safetensors file"):
            read(path)


def test_a_corrupted_checkpoint_never_loads(store):
    handle = save_checkpoint(store, Network(), structure=None)
    path = store.path_of(handle)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="corrupt"):
        load_network(Workload(), handle, store)


def test_a_missing_file_is_an_artifact_error(store):
    with pytest.raises(ArtifactError, match="not in the store"):
        load_network(Workload(), Checkpoint(sha256="0" * 64, size_bytes=1), store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), r"missing: norm\.bias"),
        (lambda t: t.update({"extra": torch.ones(1)}), "unexpected: extra"),
        (lambda t: t.update({"norm.bias": torch.ones(3)}), r"norm\.bias \(3,\) where the network has \(8,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    tensors = network_tensors(Network())
    change(tensors)
    with pytest.raises(ArtifactError, match=message):
        load_weights(Network(), tensors, source="weights.pt")


def test_a_common_prefix_is_pointed_out():
    tensors = {f"module.{name}": tensor for name, tensor in Network().state_dict().items()}
    with pytest.raises(ArtifactError, match=r"they all start with 'module\.'"):
        load_weights(Network(), tensors, source="weights.pt")


def test_extra_state_that_is_no_tensor_is_a_workload_error():
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(WorkloadError, match="_extra_state"):
        network_tensors(Stateful(2, 2))
