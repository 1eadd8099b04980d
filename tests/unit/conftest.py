"""What stages are tried with: small workloads, contexts, and the loopback target through its real SSH server."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jetway.configs.schema import Target, WorkloadConfig
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target
from jetway.tasks.workload import Workload, load_workload

LOOPBACK = Target(name="loopback", kind="loopback")
USER_PROJECT = Path(__file__).parent / "user_project"


@pytest.fixture(autouse=True)
def one_thread():
    """One thread and one seed, whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_workload():
    """Makes the workload of the user's project; its options choose among the small networks."""

    def make(**options):
        config = WorkloadConfig(class_path="small_networks:SmallWorkload", options=options)
        return load_workload(config, search_path=[USER_PROJECT])

    return make


class MemoryIndex:
    """Finished stages, in this process."""

    def __init__(self):
        self.outputs = {}

    def find(self, key):
        return self.outputs.get(key)

    def record(self, key, stage, output, seconds):
        self.outputs[key] = output


@pytest.fixture(scope="session")
def make_context():
    """Makes a context with its files in a folder, which with ``reuse`` finds its finished stages again."""

    def make(workload, folder, *, reuse=False, **values):
        index = MemoryIndex() if reuse else None
        folders = {"store": Store(folder / "store"), "work_dir": folder / "work"}
        return StageContext(workload, **folders, threads=1, index=index, **values)

    return make


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, image, offset):
        return self.head(self.stem(image).mean(dim=(2, 3)) + offset[:, None])


class Tiny(Workload):
    """Two named inputs; the targets are what the network itself answers, but for every fifth sample."""

    output_names = ("logits",)

    def __init__(self):
        torch.manual_seed(1)
        self.trained = TinyNet().eval()

    def network(self):
        return TinyNet()

    def example_inputs(self):
        return {"image": torch.randn(1, 1, 12, 12), "offset": torch.rand(1)}

    def train_data(self):
        return self.evaluation_data()

    calibration_data = train_data

    def evaluation_data(self):
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(30, 1, 12, 12, generator=generator)
        offsets = torch.rand(30, generator=generator)
        with torch.no_grad():
            answers = self.trained(images, offsets).argmax(1)
        return [
            ({"image": images[i], "offset": offsets[i]}, int(answers[i] if i % 5 else (answers[i] + 1) % 4))
            for i in range(30)
        ]

    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """``session`` on the loopback target, ``context``, and ``onnx`` of the tiny workload."""
    home = tmp_path_factory.mktemp("deployed")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETWAY_HOME", str(home))
        context = StageContext(Tiny(), Store(home / "store"), seed=5, threads=1)
        with open_target(LOOPBACK) as session:
            onnx = export_tiny(context)
            yield SimpleNamespace(session=session, context=context, onnx=onnx, home=home)


def export_tiny(context):
    with context.store.scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = folder / "tiny.onnx"
        torch.onnx.export(
            context.workload.trained,
            tuple(context.workload.example_inputs().values()),
            path,
            input_names=["image", "offset"],
            output_names=["logits"],
            opset_version=17,
            dynamo=False,
        )
        return context.store.add(OnnxModel, path, metadata={"opset": 17, "precision": "fp32"})
