"""The package of a winner: made and tried on a target, and run on its own from an unpacked folder."""

import json
import os
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from jetway.configs.schema import BuildConfig, CascadeConfig, ExportConfig, Precision
from jetway.tasks.artifacts import OnnxModel, Package
from jetway.tasks.build import build_engine
from jetway.tasks.cascade_unit import Behind
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.errors import RemoteCommandError
from jetway.tasks.export import export_onnx
from jetway.tasks.package import package_winner, verify_package, zip_folder
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target
from jetway.tasks.workload import Workload
from jetway.tasks.workloads.detector import SceneDetector
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier

FILES = {
    "model.engine", "passport.json", "model.onnx", "labels.txt", "infer.py", "benchmark.sh", "runtime.zip",
    "sample_input.npz", "expected_output.npz", "README.md",
}  # fmt: skip


class Shapes(Workload):
    """Two named inputs, three labelled classes."""

    output_names = ("logits",)
    labels = ("circle", "square", "Dreieck △")

    def network(self):
        torch.manual_seed(3)
        return AddOffset()

    def example_inputs(self):
        return {"image": torch.zeros(1, 1, 8, 8), "offset": torch.zeros(1)}

    def evaluation_data(self):
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(1, 8, 8, generator=generator)
        return [({"image": image, "offset": torch.tensor(0.5)}, 0)]

    train_data = calibration_data = evaluation_data

    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target)


class AddOffset(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, image, offset):
        return self.head(self.conv(image).relu().mean(dim=(2, 3)) + offset[:, None])


on_loopback = pytest.mark.parametrize("target", ["loopback"], indirect=True)


@pytest.fixture
def session(target, agent_folder):
    """With the one Python here that has ONNX Runtime."""
    with open_target(
        target.model_copy(update={"python": sys.executable}), agent_folder=agent_folder
    ) as session:
        yield session


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return StageContext(Shapes(), Store(tmp_path_factory.mktemp("store")), seed=5, threads=1)


@pytest.fixture(scope="module")
def onnx(context):
    with context.store.scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            context.workload.network().eval(),
            tuple(context.workload.example_inputs().values()),
            folder / "shapes.onnx",
            input_names=["image", "offset"],
            output_names=["logits"],
            opset_version=17,
            dynamo=False,
        )
        return context.store.add(OnnxModel, folder / "shapes.onnx", metadata={"opset": 17})


@pytest.fixture
def engine(context, session, onnx):
    return build_engine(context, session, onnx, BuildConfig())


@pytest.fixture(scope="module")
def made():
    """Packages by the name of their target: each is made once."""
    return {}


@pytest.fixture
def package(context, session, engine, onnx, made):
    if session.target.name not in made:
        output = package_winner(context, session, engine, onnx, variant="pruned-fp32")
        made[session.target.name] = output.handle
    return made[session.target.name]


@pytest.fixture
def unpacked(context, package, tmp_path):
    with zipfile.ZipFile(context.store.open(package)) as archive:
        archive.extractall(tmp_path / "un packed")
    return tmp_path / "un packed"


def infer(folder, *arguments, script="infer.py"):
    """In isolation, from elsewhere, and with no other Jetway than what the package holds."""
    check = "assert all(folder in m.__file__ for n, m in sys.modules.items() if n.startswith('jetway'))"
    code = (
        "import sys, runpy, atexit; sys.argv = sys.argv[1:]; folder = sys.argv.pop(0); "
        f"atexit.register(lambda: exec({check!r})); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), str(folder / script), *arguments],
        capture_output=True, text=True, encoding="utf-8", timeout=60, cwd="/", env={"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert "AssertionError" not in done.stderr
    return done


def remote_folders(session):
    listed = session.connection.run(["ls", session.target.work_dir], timeout_s=10).text.split()
    return [name for name in listed if name.startswith("package.")]


def test_package_is_made_and_tried_on_the_target(context, session, engine, onnx, package):
    assert isinstance(package, Package)
    assert package.parents == (engine.sha256, onnx.sha256)
    with zipfile.ZipFile(context.store.open(package)) as archive:
        assert set(archive.namelist()) == FILES
        assert archive.read("model.engine") == context.store.open(engine).read_bytes()
        assert archive.read("model.onnx") == context.store.open(onnx).read_bytes()
        assert not json.loads(archive.read("passport.json")).keys() & {"remote_path", "target", "reused"}
        assert "$" not in archive.read("README.md").decode().replace("$PYTHON", "")
    assert remote_folders(session) == []
    assert list((context.store.root / "tmp").iterdir()) == []
    assert package_winner(context, session, engine, onnx, variant="pruned-fp32").handle == package


@on_loopback
def test_packaged_files_run_without_jetway(context, unpacked):
    (inputs, _), *_ = context.workload.evaluation_data()
    with torch.no_grad():
        expected = context.workload.network().eval()(inputs["image"][None], inputs["offset"][None])
    with np.load(unpacked / "expected_output.npz") as file:
        np.testing.assert_allclose(file["logits"], expected.numpy(), atol=1e-5)

    shown = infer(unpacked)
    assert shown.returncode == 0, shown.stderr
    assert "logits float32[1, 3]" in shown.stdout
    assert f"label: {context.workload.labels[int(expected.argmax())]}" in shown.stdout
    checked = infer(unpacked, "--check", "--benchmark", "5")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "PASS: logits" in checked.stdout
    assert "latency of 5 runs: p50" in checked.stdout
    timed = subprocess.run(
        ["sh", unpacked / "benchmark.sh", "7"], env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    assert "latency of 7 runs" in timed.stdout, timed.stderr


@on_loopback
def test_other_output_fails_with_the_largest_error(unpacked):
    with np.load(unpacked / "expected_output.npz") as file:
        np.savez(unpacked / "expected_output.npz", logits=file["logits"] + np.float32([[0, 0.25, 0]]))
    checked = infer(unpacked, "--check")
    assert checked.returncode == 1
    assert "FAIL: logits: largest error 0.25" in checked.stdout


def test_what_is_not_as_the_passport_says_is_refused(context, session, package, unpacked):
    passport = json.loads((unpacked / "passport.json").read_text())
    passport["platform"]["engine_version"] = "1.0.0"
    (unpacked / "passport.json").write_text(json.dumps(passport))
    refused = infer(unpacked)
    assert refused.returncode == 2
    assert "and was 1.0.0 there" in refused.stderr

    with zipfile.ZipFile(context.store.open(package)) as archive:
        archive.extract("passport.json", unpacked)
    engine = unpacked / "model.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    refused = infer(unpacked)
    assert refused.returncode == 2
    assert "corrupt" in refused.stderr
    with pytest.raises(RemoteCommandError, match=r"infer.py --check of the package fails there.*corrupt"):
        verify_package(session, zip_folder(unpacked))
    assert remote_folders(session) == []


@pytest.fixture
def unit(session, tmp_path):
    """A cascade's package, unpacked: networks that nobody trained, and every box counts."""
    config = CascadeConfig(classifier="c", min_score=0.0, max_objects=3)
    detector = SceneDetector(size=64, widths=(16, 32, 32), neck=32, scenes=(1, 1, 2))
    made = [
        built(session, StageContext(workload, Store(tmp_path / "store"), threads=1))
        for workload in (detector, CropClassifier(size=32, width=0.5, scenes=(1, 1, 1)))
    ]
    (context, engine, onnx), classifier = made
    packed = package_winner(context, session, engine, onnx, behind=Behind(*classifier, config)).handle
    with zipfile.ZipFile(context.store.open(packed)) as archive:
        archive.extractall(tmp_path / "un packed")
    return tmp_path / "un packed"


def built(session, context):
    torch.manual_seed(0)
    checkpoint = save_checkpoint(context.store, context.workload.network(), structure=None)
    onnx = export_onnx(context, checkpoint, ExportConfig(), Precision.FP32).handle
    return context, build_engine(context, session, onnx, BuildConfig()), onnx


@on_loopback
def test_a_cascade_is_one_package(unit):
    names = {path.relative_to(unit).as_posix() for path in unit.rglob("*") if path.is_file()}
    assert names >= FILES | {f"classifier/{name}" for name in FILES}
    assert "python3 cascade.py" in (unit / "README.md").read_text()
    assert "python3 cascade.py" not in (unit / "classifier/README.md").read_text()

    shown = infer(unit, script="cascade.py")
    frames = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [len(frame["objects"]) for frame in frames] == [3, 3], shown.stderr
    assert all(found["label"] in "0123456789" for frame in frames for found in frame["objects"])
    checked = infer(unit, "--check", "--time", script="cascade.py")
    assert checked.returncode == 0, checked.stderr
    assert "PASS: 6 objects in 2 frames" in checked.stdout
    assert "classify: p50" in checked.stdout
    for part in (unit, unit / "classifier"):
        assert infer(part, "--check").returncode == 0

    frames[1]["objects"][2]["label"] = "none"
    (unit / "expected_cascade.jsonl").write_text("".join(json.dumps(frame) + "\n" for frame in frames))
    checked = infer(unit, "--check", script="cascade.py")
    assert (checked.returncode, checked.stdout[:14]) == (1, "FAIL: frame 1:")
    (unit / "classifier/model.engine").write_bytes(b"other")
    refused = infer(unit, script="cascade.py")
    assert refused.returncode == 2
    assert "corrupt" in refused.stderr
