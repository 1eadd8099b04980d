"""Training where there is a GPU: bfloat16 autocast, resume, and a network that comes back on the CPU."""

from pathlib import Path

import pytest
import torch

from jetway.configs.schema import DistillationConfig, FinetuneConfig, WorkloadConfig
from jetway.tasks.importance import accumulate_gradients
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.training import evaluate, train
from jetway.tasks.workload import load_workload

pytestmark = pytest.mark.gpu

USER_PROJECT = Path(__file__).parents[1] / "unit" / "user_project"


class Interrupted(Exception):
    pass


@pytest.fixture
def run(tmp_path):
    def train_once(folder, *, stop_after=None, epochs=4, **changes):
        workload = load_workload(
            WorkloadConfig(class_path="small_networks:SmallWorkload", options={"samples": 200}),
            search_path=[USER_PROJECT],
        )
        section = FinetuneConfig(
            epochs=epochs, batch_size=16, learning_rate=3e-3, distillation=DistillationConfig(), **changes
        )
        context = StageContext(workload, Store(tmp_path), work_dir=tmp_path / folder)
        assert context.device == "cuda"
        torch.manual_seed(7)
        network, teacher, dtypes = workload.network(), workload.network(), set()
        network.project.register_forward_hook(lambda module, given, returned: dtypes.add(returned.dtype))

        def on_epoch(epoch):
            if epoch.epoch == stop_after:
                raise Interrupted

        result = train(
            network, workload, section, context=context, data=workload.train_data(), teacher=teacher,
            stage="finetune", on_epoch=on_epoch,
        )  # fmt: skip
        return workload, network, result, dtypes

    return train_once


def test_training_learns_and_comes_back_on_the_cpu(run):
    workload, network, result, _ = run("plain")
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert result.metrics["top1"] > result.history[0].metrics["top1"]
    assert evaluate(workload, network)["top1"] == pytest.approx(result.metrics["top1"], abs=0.051)


@pytest.mark.parametrize("mixed", [True, False])
def test_mixed_precision_is_bfloat16_and_can_be_turned_off(run, mixed):
    *_, dtypes = run("mixed", epochs=1, mixed_precision=mixed)
    assert (torch.bfloat16 in dtypes) is mixed


def test_an_interrupted_training_resumes(run):
    with pytest.raises(Interrupted):
        run("stopped", stop_after=2)
    *_, result, _ = run("stopped")
    *_, expected, _ = run("whole")
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3, 4]
    # cuDNN may add in another order; the loss of each epoch agrees to a percent.
    losses = [epoch.loss for epoch in result.history[1:]]
    assert losses == pytest.approx([epoch.loss for epoch in expected.history[1:]], rel=0.01)


def test_gradients_come_back_with_the_network(run, tmp_path):
    workload, network, *_ = run("gradients", epochs=0)
    accumulate_gradients(network, StageContext(workload, Store(tmp_path)), samples=32)
    assert all(parameter.grad.device.type == "cpu" for parameter in network.parameters())
    assert float(network.project.weight.grad.abs().sum()) > 0
