"""Training by several processes: torchrun starts ``training_worker`` in each, and their result comes back.

The network travels as a checkpoint file with its records, the section and the rest as JSON. The processes end
when this one does, however it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from jetway.configs.schema import QatConfig, TrainingSection
from jetway.tasks import errors
from jetway.tasks.checkpoint import CheckpointRecord, network_tensors, save_tensors
from jetway.tasks.errors import ConfigError, JetwayError, TrainingError
from jetway.tasks.quantization import quantization_record
from jetway.tasks.stage import StageContext
from jetway.tasks.structure import Structure, describe_structure
from jetway.tasks.workload import Workload

REQUEST, RESULT, ERROR = "request.json", "result.json", "error.json"
STUDENT, TEACHER, TRAINED = "student.safetensors", "teacher.safetensors", "trained.safetensors"

#: Begins the lines of ours on standard output, where a workload may print too.
LINE_MARK = "jetway: "

_END_S = 30.0
_LOG_LINES = 20


@dataclass(frozen=True)
class Training:
    """What ``training.train`` was asked for."""

    network: nn.Module
    workload: Workload
    section: TrainingSection
    context: StageContext
    teacher: nn.Module | None
    stage: str
    structure: Structure | None


def train_with_torchrun(training: Training, on_epoch: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Trains the network in place and returns the result as ``TrainResult.to_json`` writes it.

    Raises ConfigError when there are fewer GPUs than processes, TrainingError when a process dies, and
    whatever error of ours a process raised.
    """
    _check_devices(training)
    folder = training.context.work_dir / f"torchrun-{training.stage}"
    _write_request(training, folder)
    with _torchrun(folder, training.section.processes) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(LINE_MARK):
                _report(json.loads(line.removeprefix(LINE_MARK)), training, on_epoch)
    if process.returncode:
        raise _error(folder, process.returncode)
    training.network.load_state_dict(load_file(folder / TRAINED))
    training.network.eval()
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def _check_devices(training: Training) -> None:
    wanted, there = training.section.processes, torch.cuda.device_count()
    if there and wanted > there:
        raise ConfigError(
            f"{training.stage}: processes asks for {wanted} GPUs, this machine has {there}. "
            f"Set processes to {there}, or run on a machine with {wanted}."
        )
    if training.context.workload_config is None:
        raise ConfigError(
            f"{training.stage}: processes is {wanted} and loader_workers {training.section.loader_workers}, but "
            "other processes cannot make this workload, as it was not loaded from a recipe. Pass workload_config to "
            "the context, or set processes to 1 and loader_workers to 0."
        )


def _write_request(training: Training, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, ERROR):
        (folder / name).unlink(missing_ok=True)
    context, section = training.context, training.section
    save_tensors(network_tensors(training.network), folder / STUDENT, _student_record(training))
    if (teacher := training.teacher) is not None:
        save_tensors(network_tensors(teacher), folder / TEACHER, _float_record(training.workload, teacher))
    assert context.workload_config
    request = {
        "workload": context.workload_config.model_dump(mode="json"),
        "workload_digest": context.workload_digest,
        "section": {"kind": type(section).__name__, "values": section.model_dump(mode="json")},
        "has_teacher": training.teacher is not None,
        "stage": training.stage,
        "seed": context.seed,
        "threads": max(1, context.threads // section.processes),
        "work_dir": str(context.work_dir),
        "search_path": sys.path,
        "parent": os.getpid(),
    }
    (folder / REQUEST).write_text(json.dumps(request))


def _student_record(training: Training) -> CheckpointRecord:
    if isinstance(training.section, QatConfig):
        quantization = quantization_record(training.network)
        return CheckpointRecord(structure=training.structure, quantization=quantization)
    return _float_record(training.workload, training.network)


def _float_record(workload: Workload, network: nn.Module) -> CheckpointRecord:
    return CheckpointRecord(structure=describe_structure(workload.network(), network))


@contextmanager
def _torchrun(folder: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "jetway.tasks.training_worker", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        try:
            yield process
            process.wait()
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def _report(line: dict[str, Any], training: Training, on_epoch: Callable[[dict[str, Any]], object]) -> None:
    if "epoch" in line:
        on_epoch(line["epoch"])
    else:
        training.context.progress(training.stage, line["done"], line["total"], line["text"])


def _error(folder: Path, code: int) -> JetwayError:
    if (folder / ERROR).exists():
        error = json.loads((folder / ERROR).read_text())
        kind: type[JetwayError] = getattr(errors, error["type"])
        return kind(error["message"])
    said = (folder / "log.txt").read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return TrainingError(
        f"A training process under torchrun ended with exit code {code}. Its last lines:\n" + "\n".join(said)
    )
