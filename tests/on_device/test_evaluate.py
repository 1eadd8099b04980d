import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from jetway.tasks.on_device import evaluate, passport
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensors import Tensor


def run(workplace, onnx_path, example, *inputs):
    entry = workplace.entry("network", onnx_path, example)
    request = {"engine": entry, "inputs": list(inputs), "work_dir": str(workplace.work_dir)}
    return evaluate.run(request, workplace.progress.append)


def joined(path, name="logits"):
    """All samples of one output, in order."""
    arrays = load_file(path)
    starts = sorted(int(key.rpartition(".")[2]) for key in arrays)
    return np.concatenate([arrays[f"{name}.{start}"] for start in starts])


def plain_outputs(onnx_path, images):
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": images[i : i + 1]})[0] for i in range(len(images))])


def images_of(path):
    return load_file(path)["image"]


@pytest.mark.parametrize(
    ("network", "example", "samples"),
    [("conv", 1, 6), ("batch4", 4, 10), ("batch4", 4, 8), ("dynamic", 2, 35)],
)
def test_outputs_are_those_of_a_plain_session(workplace, networks, network, example, samples):
    """Whatever the batch of the engine, and whether the samples fill it."""
    inputs = workplace.images(samples, "samples")
    result = run(workplace, networks[network], workplace.images(example, "example"), inputs)
    got = joined(result["outputs"][0]["path"])
    np.testing.assert_allclose(got, plain_outputs(networks["conv"], images_of(inputs)), rtol=1e-4, atol=1e-5)
    assert result["samples"] == samples
    assert result["outputs"][0]["sha256"] == passport.file_sha256(result["outputs"][0]["path"])


def test_each_input_file_gives_one_output_file(workplace, networks):
    files = [workplace.images(3, "a"), workplace.images(2, "b")]
    result = run(workplace, networks["conv"], workplace.images(1, "example"), *files)
    assert [len(joined(entry["path"])) for entry in result["outputs"]] == [3, 2]
    assert result["samples"] == 5


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 4)

    def forward(self, tokens, scale):
        return (self.embedding(tokens) * scale[:, None, None]).sum(1), tokens.max(dim=1).values


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inputs_and_outputs_of_other_types(workplace):
    torch.manual_seed(0)
    path = workplace.folder / "two.onnx"
    tokens, scale = torch.randint(0, 16, (1, 5)), torch.rand(1, dtype=torch.float32)
    torch.onnx.export(
        TwoInputs(), (tokens, scale), path, input_names=["tokens", "scale"],
        output_names=["sum", "largest"], dynamo=False, opset_version=17,
    )  # fmt: skip
    arrays = {
        "tokens": np.random.default_rng(0).integers(0, 16, (4, 5)),
        "scale": np.random.default_rng(1).random(4, dtype=np.float32),
    }
    example = workplace.save("example", tokens=tokens.numpy(), scale=scale.numpy())
    result = run(workplace, path, example, workplace.save("samples", **arrays))
    outputs = load_file(result["outputs"][0]["path"])
    assert sorted(outputs) == sorted(f"{name}.{i}" for name in ("sum", "largest") for i in range(4))
    assert outputs["largest.2"].dtype == np.int64
    assert outputs["largest.2"].tolist() == [arrays["tokens"][2].max()]


def test_inputs_that_disagree_on_the_samples_are_refused():
    for other in (np.zeros((3, 1)), np.zeros(())):
        with pytest.raises(DeviceError, match="disagree"):
            evaluate._sample_count({"a": Tensor.of(np.zeros((2, 1))), "b": Tensor.of(other)})


def test_an_output_of_one_sample_may_have_any_shape():
    """Detections, whose number differs from sample to sample, come without a batch dimension."""
    found = evaluate._rows("boxes", Tensor.of(np.zeros((7, 4))), 1, 1)
    assert found.shape == (1, 7, 4)


def test_an_output_without_its_batch_is_refused():
    with pytest.raises(DeviceError, match="'boxes'"):
        evaluate._rows("boxes", Tensor.of(np.zeros((7, 4))), 2, 2)


def test_a_corrupt_engine_scores_nothing(workplace, networks):
    entry = workplace.entry("conv", networks["conv"], workplace.images(1))
    with open(entry["path"], "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff\xff\xff")
    request = {"engine": entry, "inputs": [workplace.images(2)], "work_dir": str(workplace.work_dir)}
    with pytest.raises(DeviceError, match="corrupt"):
        evaluate.run(request, print)
    assert not (workplace.work_dir / "outputs").exists()
