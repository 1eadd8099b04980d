"""Training by two processes under torchrun, on this machine's CPU (gloo)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jetway.configs.schema import DistillationConfig, FinetuneConfig, QatConfig, WorkloadConfig
from jetway.tasks.errors import ConfigError, TrainingError, WorkloadError
from jetway.tasks.quantization import CalibrationSection, quantize_network
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.training import evaluate, train
from jetway.tasks.workload import load_workload

USER_PROJECT = Path(__file__).parents[1] / "unit" / "user_project"


@pytest.fixture
def context(tmp_path):
    def make(folder, **options):
        config = WorkloadConfig(class_path="small_networks:SmallWorkload", options={"samples": 120} | options)
        workload = load_workload(config, search_path=[USER_PROJECT])
        return StageContext(
            workload, Store(tmp_path), workload_config=config, threads=2, work_dir=tmp_path / folder
        )

    return make


def settings(kind=FinetuneConfig, **changes):
    return kind(**{"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "processes": 2, **changes})


def run(context, section, network=None, **more):
    torch.manual_seed(7)
    network = network or context.workload.network()
    data = context.workload.train_data()
    result = train(network, context.workload, section, context=context, data=data, stage="finetune", **more)
    return network, result


def test_two_processes_train_one_network_and_a_killed_run_goes_on(context):
    steps = []
    whole = context("whole")
    whole.progress = lambda stage, done, total, text="": steps.append((stage, done, total))
    teacher = whole.workload.network()
    section = settings(epochs=4, distillation=DistillationConfig(), loader_workers=1)
    network, result = run(whole, section, teacher=teacher)
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3, 4]
    assert result.history[-1].loss < result.history[1].loss
    # What came back is what was scored by both processes together, and each took half of the steps.
    assert evaluate(whole.workload, network) == result.metrics
    assert steps[-1] == ("finetune", 4 * 8, 4 * 8)

    class Killed(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        run(context("stopped"), section, teacher=teacher, on_epoch=stop)
    redone = []
    resumed, again = run(
        context("stopped"), section, teacher=teacher, on_epoch=lambda epoch: redone.append(epoch.epoch)
    )
    assert redone[-1] == 4
    assert 1 not in redone
    assert [epoch.loss for epoch in again.history] == [epoch.loss for epoch in result.history]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_a_quantized_network_trains_in_two_processes(context):
    given = context("qat")
    network = given.workload.network()
    section = settings(QatConfig, epochs=1)
    calibration = CalibrationSection(
        **{key: getattr(section, key) for key in CalibrationSection.model_fields}
    )
    quantize_network(network, given.workload, calibration)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained, result = run(given, section, network)
    assert evaluate(given.workload, trained) == result.metrics
    after = trained.state_dict()
    ranges = [name for name in before if name.endswith("input_quantizer._amax")]
    assert ranges
    assert all(torch.equal(before[name], after[name]) for name in ranges)
    assert result.best_epoch == 1
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_loading_processes_draw_the_same_whatever_their_number(context):
    (first, one), (second, two) = (
        run(context(str(workers), augmented=True), settings(processes=1, loader_workers=workers))
        for workers in (1, 2)
    )
    assert [epoch.loss for epoch in one.history] == [epoch.loss for epoch in two.history]
    assert all(epoch.samples_per_s > 0 for epoch in one.history[1:])
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_an_error_of_a_process_arrives_as_itself(context):
    with pytest.raises(WorkloadError, match="only 1 samples for 2 processes"):
        run(context("tiny", samples=1), settings())


@pytest.mark.slow
def test_an_error_of_a_step_arrives_as_itself(context):
    with pytest.raises(TrainingError, match="the loss became"):
        run(context("diverges"), settings(learning_rate=1e30, optimizer="sgd"))


def test_a_context_without_a_recipe_is_refused(context):
    given = context("bare")
    given.workload_config = None
    with pytest.raises(ConfigError, match="set processes to 1"):
        run(given, settings())


CALLER = """
import sys
sys.path[:0] = {path!r}
from test_training_processes import *
config = WorkloadConfig(class_path="small_networks:SmallWorkload", options={{"samples": 120}})
workload = load_workload(config, search_path=[USER_PROJECT])
context = StageContext(workload, Store(Path({folder!r})), workload_config=config, work_dir=Path({folder!r}))
run(context, settings(epochs=5000), on_epoch=lambda epoch: print(epoch.epoch, flush=True))
"""


def test_processes_end_with_a_killed_caller(tmp_path):
    code = CALLER.format(path=[str(Path(__file__).parent)], folder=str(tmp_path))
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout.readline().strip() == "1"
    assert len(workers(tmp_path)) >= 2
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 60
    while workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not workers(tmp_path)


def workers(folder):
    """Processes whose command line names the folder."""
    return [
        entry.parent.name
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if str(folder) in read(entry) and "training_worker" in read(entry)
    ]


def read(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
