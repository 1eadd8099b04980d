"""A training process that is really killed goes on from its last finished epoch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from jetway.configs.schema import TrainConfig, WorkloadConfig
from jetway.tasks.load import load
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

USER_PROJECT = Path(__file__).parents[1] / "unit" / "user_project"
CONFIG = WorkloadConfig(class_path="small_networks:SmallWorkload", options={"samples": 400})
TRAINING = TrainConfig(epochs=6, batch_size=16)
STEPS_AN_EPOCH = 25

PROCESS = """
import json, sys
from pathlib import Path
from jetway.configs.schema import TrainConfig, WorkloadConfig
from jetway.tasks.load import load
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

project, config, training, store = sys.argv[1:]

def progress(stage, done, total, text=""):
    print(done, flush=True)

workload = load_workload(WorkloadConfig.model_validate_json(config), search_path=[Path(project)])
context = StageContext(workload, Store(Path(store)), threads=1, progress=progress)
load.fn(context, None, TrainConfig.model_validate_json(training))
"""


def test_a_killed_training_resumes_to_the_same_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "killed"))
    arguments = [
        str(USER_PROJECT),
        CONFIG.model_dump_json(),
        TRAINING.model_dump_json(),
        str(tmp_path / "store"),
    ]
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 3.5 * STEPS_AN_EPOCH:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    steps, threads = [], torch.get_num_threads()
    workload = load_workload(CONFIG, search_path=[USER_PROJECT])
    context = StageContext(workload, Store(tmp_path / "store"), threads=1)
    context.progress = lambda stage, done, total, text="": steps.append(done)
    resumed = load.fn(context, None, TRAINING)
    # At most the interrupted epoch is done again, and nothing is left to resume from.
    assert steps[0] == 3 * STEPS_AN_EPOCH + 1
    assert not list((tmp_path / "killed" / "work").iterdir())

    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "whole"))
    assert load.fn(context, None, TRAINING).handle == resumed.handle
    torch.set_num_threads(threads)
