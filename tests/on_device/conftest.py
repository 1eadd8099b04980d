"""Networks as ONNX files, and a folder of their own for verbs that run in this process."""

import subprocess
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from doubles.board import Board
from onnx import helper
from torch import nn

from jetway.tasks.on_device import build, passport, tensors


class Residual(nn.Module):
    """A stem, a residual block and a head: what the blocked layout and the fusions of an engine work on."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, image):
        features = self.stem(image)
        features = torch.relu(features + self.body(features))
        return self.head(features.mean(dim=(2, 3)))


def export(network, inputs, path, *, dynamic=False, output="logits"):
    axes = {name: {0: "batch"} for name in (*inputs, output)} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=[output],
            opset_version=17,
            dynamo=False,
            dynamic_axes=axes,
        )
    return path


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Paths of ONNX files: conv (batch 1), batch4, dynamic."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    network = Residual()
    return {
        "conv": export(network, {"image": torch.randn(1, 1, 24, 24)}, folder / "conv.onnx"),
        "batch4": export(network, {"image": torch.randn(4, 1, 24, 24)}, folder / "batch4.onnx"),
        "dynamic": export(
            network, {"image": torch.randn(2, 1, 24, 24)}, folder / "dynamic.onnx", dynamic=True
        ),
    }


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder stands for the job's, ``work`` for the target's work folder."""
    torch.set_num_threads(1)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    return Workplace(tmp_path)


class Workplace:
    def __init__(self, folder):
        self.folder = folder
        self.work_dir = folder / "work"
        self.progress = []

    def save(self, name, **arrays):
        path = str(self.folder / f"{name}.safetensors")
        with tensors.TensorWriter(path) as writer:
            for key, array in arrays.items():
                writer.add(key, array)
        return path

    def images(self, count, name="images"):
        values = np.random.default_rng(0).standard_normal((count, 1, 24, 24), dtype=np.float32)
        return self.save(name, image=values)

    def build(self, onnx_path, inputs, **extra):
        request = {
            "onnx": str(onnx_path),
            "onnx_sha256": passport.file_sha256(str(onnx_path)),
            "inputs": inputs,
            "threads": 1,
            "revision": 1,
            "work_dir": str(self.work_dir),
            **extra,
        }
        return build.run(request, self.progress.append)

    def entry(self, name, onnx_path, inputs):
        """An engine as the benchmark and the evaluation take it."""
        built = self.build(onnx_path, inputs)
        return {
            "name": name,
            "path": built["engine"],
            "sha256": built["passport"]["engine_sha256"],
            "inputs": inputs,
        }

    def one_node(self, operator, name="node_7", *, domain="", opset=17, **attributes):
        """An ONNX file of one operator on a vector of four floats."""
        value = [onnx.TensorProto.FLOAT, [4]]
        graph = helper.make_graph(
            [helper.make_node(operator, ["x"], ["y"], name=name, domain=domain, **attributes)],
            "one",
            [helper.make_tensor_value_info("x", *value)],
            [helper.make_tensor_value_info("y", *value)],
        )
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
        path = self.folder / f"{operator}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path


@pytest.fixture
def nvml_double(tmp_path, monkeypatch):
    """NVML is the double, here and in processes that are started from here."""
    library = tmp_path / "libnvidia-ml.so.1"
    source = Path(__file__).parents[1] / "doubles/nvml_double.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("JETWAY_LIBNVML", str(library))
    return str(library)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """``board("Nano JP4.6")``: this process runs on a fake board; tests/doubles/board.py lists them."""

    def make(name):
        made = Board(tmp_path / "board", name)
        for variable, value in made.environment.items():
            monkeypatch.setenv(variable, value)
        return made

    return make
