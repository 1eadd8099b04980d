import importlib

import pytest
import torch
from torch import nn

from jetway.configs.schema import WorkloadConfig
from jetway.tasks.errors import ConfigError, WorkloadError
from jetway.tasks.sources import source_digests
from jetway.tasks.workload import (
    Workload,
    call_network,
    check_workload,
    evaluate_network,
    load_workload,
    workload_digest,
)

SOURCE = """
from torch import nn, ones, zeros
from jetway.tasks.workload import Workload

class Rows(list):
    pass

class Sum(nn.Module):
    def forward(self, a, b):
        {forward}

class Two(Workload):
    output_names = ("total", "parity")
    def __init__(self, count=3):
        self.count = count
    def network(self): return Sum()
    def example_inputs(self): return {{"a": ones(1, 2), "b": zeros(1, 2).long()}}
    def train_data(self): return Rows()
    def calibration_data(self): return Rows()
    def evaluation_data(self): return Rows(({{"a": ones(2) * i, "b": zeros(2).long()}}, 0) for i in range(self.count))
    def loss(self, outputs, target): return outputs["total"].sum()

class NotAWorkload:
    pass
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    def write(name, forward="return a + b, b % 2"):
        (tmp_path / f"{name}.py").write_text(SOURCE.format(forward=forward))
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


def load(folder, name, **options):
    config = WorkloadConfig(class_path=f"{name}:Two", options=options)
    return load_workload(config, search_path=[folder])


def test_two_inputs_and_two_outputs_have_names(project):
    workload = load(project("w_good"), "w_good", count=5)
    check_workload(workload)
    outputs = call_network(workload.network(), workload.example_inputs(), workload.output_names)
    assert list(outputs) == ["total", "parity"]
    assert len(evaluate_network(workload, workload.network(), batch_size=2)) == 5


def test_integer_outputs_are_scored_as_they_are_and_half_ones_as_float32(project):
    seen = []
    workload = load(project("w_dtypes", "return a.bfloat16(), b % 2"), "w_dtypes", count=1)
    workload.score_sample = lambda outputs, target: seen.append(outputs) or {"top1": 1.0}
    evaluate_network(workload, workload.network())
    assert {name: str(array.dtype) for name, array in seen[0].items()} == {
        "total": "float32",
        "parity": "int64",
    }


def test_outputs_may_be_a_dict(project):
    workload = load(project("w_dict", "return {'parity': b, 'total': a}"), "w_dict")
    outputs = call_network(workload.network(), workload.example_inputs(), workload.output_names)
    assert outputs["parity"].dtype == torch.int64


@pytest.mark.parametrize(
    ("forward", "fragment"),
    [
        ("return a", "output_names is"),
        ("return a, b, a", "a tuple of 3"),
        ("return {'total': a}", "a dict with"),
        ("return a @ b.float()", "example_inputs"),
    ],
)
def test_workload_whose_forward_is_wrong_is_explained(project, forward, fragment):
    name = f"w_bad_{abs(hash(forward))}"
    with pytest.raises(WorkloadError, match=fragment):
        check_workload(load(project(name, forward), name))


@pytest.mark.parametrize(
    ("class_path", "options", "fragment"),
    [
        ("w_missing_module:Two", {}, "cannot import 'w_missing_module'"),
        ("w_errors:Three", {}, "no class 'Three'"),
        ("w_errors:NotAWorkload", {}, "derives from"),
        ("w_errors:Two", {"counts": 3}, r"does not take \['counts'\]"),
    ],
)
def test_workload_that_cannot_be_loaded_is_a_config_error(project, class_path, options, fragment):
    folder = project("w_errors")
    with pytest.raises(ConfigError, match=fragment):
        load_workload(WorkloadConfig(class_path=class_path, options=options), search_path=[folder])


def test_digest_follows_source_options_and_revision(project):
    folder = project("w_digest")
    config = WorkloadConfig(class_path="w_digest:Two")
    workload = load(folder, "w_digest")
    digests = {
        workload_digest(workload, config),
        workload_digest(workload, config.model_copy(update={"options": {"count": 4}})),
        workload_digest(workload, config.model_copy(update={"revision": 2})),
    }
    (folder / "w_digest.py").write_text("# changed")
    assert len(digests | {workload_digest(workload, config)}) == 4


def digest_of(folder):
    config = WorkloadConfig(class_path="w_own.main:Two")
    return workload_digest(load_workload(config, search_path=[folder]), config)


def test_digest_follows_the_modules_that_the_workload_imports(project):
    folder = project("w_plain")
    files = {
        "__init__.py": "", "data.py": "from . import deep", "deep.py": "A = 1", "other.py": "B = 1",
        "late.py": "C = 1", "main.py": SOURCE.format(forward="import w_own.late; return a + b, b % 2"),
    }  # fmt: skip
    (folder / "w_own").mkdir()
    for name, text in files.items():
        (folder / "w_own" / name).write_text(text)
    with (folder / "w_own/main.py").open("a") as file:
        file.write("from w_own.data import *\n")
    digests = [digest_of(folder)]
    for name in ("deep", "late", "__init__"):
        (folder / f"w_own/{name}.py").write_text("A = 2")
        digests.append(digest_of(folder))
    assert len(set(digests)) == 4
    (folder / "w_own/other.py").write_text("B = 2")
    importlib.import_module("w_own.other")
    assert digest_of(folder) == digests[-1]


def test_digest_of_a_built_in_workload_covers_its_data_and_no_stage():
    importlib.import_module("jetway.tasks.workloads.digits")
    names = set(source_digests("jetway.tasks.workloads.digits"))
    assert {"jetway.tasks.workloads.digits", "jetway.data.digits"} <= names
    assert all(name.startswith(("jetway.data", "jetway.tasks.workloads")) for name in names)


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("def broken(:", r"SyntaxError: .*w_spoilt_0\.py, line \d+"),
        ("raise OSError('no disk')", r"OSError: no disk .*w_spoilt_1\.py, line \d+"),
        ("import w_absent", r"No module named 'w_absent' .*w_spoilt_2\.py, line \d+"),
        ("Two.__init__ = lambda self: len(3)", r"TypeError: object of type .*w_spoilt_3\.py, line \d+"),
    ],
)
def test_error_in_the_workloads_own_code_names_its_line(project, line, fragment):
    name = f"w_spoilt_{fragment.partition('spoilt_')[2][0]}"
    folder = project(name)
    with (folder / f"{name}.py").open("a") as file:
        file.write(line + "\n")
    last = len((folder / f"{name}.py").read_text().splitlines())
    with pytest.raises(ConfigError, match=fragment.replace(r"\d+", str(last))):
        load(folder, name)


@pytest.mark.parametrize("returned", [torch.zeros(1, 2), {}, {"a": 3}, None, [torch.zeros(1)]])
def test_example_inputs_must_be_named_tensors(project, returned, monkeypatch):
    workload = load(project("w_inputs"), "w_inputs")
    monkeypatch.setattr(workload, "example_inputs", lambda: returned)
    with pytest.raises(WorkloadError, match=r"example_inputs\(\) returned .*dict of named tensors"):
        check_workload(workload)


def test_default_score_is_top1():
    class One(Workload):
        network = example_inputs = train_data = calibration_data = evaluation_data = None
        loss = nn.CrossEntropyLoss()

    records = [One().score_sample({"output": torch.tensor([0.1, 0.9]).numpy()}, target) for target in (1, 0)]
    assert One().summarize(records) == {"top1": 0.5}
