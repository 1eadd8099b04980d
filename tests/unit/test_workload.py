import pytest
import torch
from torch import nn

from jetway.configs.schema import WorkloadConfig
from jetway.tasks.errors import ConfigError, WorkloadError
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


def test_default_score_is_top1():
    class One(Workload):
        network = example_inputs = train_data = calibration_data = evaluation_data = None
        loss = nn.CrossEntropyLoss()

    records = [One().score_sample({"output": torch.tensor([0.1, 0.9]).numpy()}, target) for target in (1, 0)]
    assert One().summarize(records) == {"top1": 0.5}
