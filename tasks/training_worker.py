"""One of the processes that torchrun starts: ``python -m jetway.tasks.training_worker FOLDER``.

Standard output carries JSON lines for the process that waits: progress, and each finished epoch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from jetway.configs import schema
from jetway.configs.schema import QatConfig, TrainingSection, WorkloadConfig
from jetway.tasks.errors import JetwayError
from jetway.tasks.quantization import read_network
from jetway.tasks.ranks import Ranks, process_group
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.torchrun import ERROR, LINE_MARK, REQUEST, RESULT, STUDENT, TEACHER, TRAINED
from jetway.tasks.training import Epoch, train
from jetway.tasks.workload import load_workload


def main(folder: Path) -> int:
    request = json.loads((folder / REQUEST).read_text())
    threading.Thread(target=end_with, args=(request["parent"],), daemon=True).start()
    sys.path[:] = request["search_path"]
    torch.set_num_threads(request["threads"])
    try:
        with process_group() as ranks:
            run(request, folder, ranks)
    except JetwayError as exc:
        part = folder / f"{ERROR}.{os.getpid()}"
        part.write_text(json.dumps({"type": type(exc).__name__, "message": str(exc)}))
        part.replace(folder / ERROR)
        return 1
    return 0


def run(request: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    context = make_context(request, ranks)
    workload, section = context.workload, section_of(request["section"])
    network = read_network(workload, folder / STUDENT)
    result = train(
        network,
        workload,
        section,
        context=context,
        data=workload.qat_data() if isinstance(section, QatConfig) else workload.train_data(),
        teacher=read_network(workload, folder / TEACHER) if request["has_teacher"] else None,
        stage=request["stage"],
        on_epoch=report_epoch if ranks.is_first else None,
    )
    if ranks.is_first:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()},
            folder / TRAINED,
        )
        (folder / RESULT).write_text(json.dumps(result.to_json()))


def make_context(request: dict[str, Any], ranks: Ranks) -> StageContext:
    config = WorkloadConfig(**request["workload"])
    return StageContext(
        load_workload(config, search_path=[Path(folder) for folder in request["search_path"]]),
        Store(),
        workload_config=config,
        workload_digest=request["workload_digest"],
        seed=request["seed"],
        threads=request["threads"],
        work_dir=Path(request["work_dir"]),
        progress=seldom(report_progress) if ranks.is_first else report_nothing,
    )


def section_of(document: dict[str, Any]) -> TrainingSection:
    kind: type[TrainingSection] = getattr(schema, document["kind"])
    return kind(**document["values"])


def report_progress(stage: str, done: float, total: float, text: str = "") -> None:
    print_line({"done": done, "total": total, "text": text})


def report_nothing(stage: str, done: float, total: float, text: str = "") -> None:
    pass


def report_epoch(epoch: Epoch) -> None:
    print_line({"epoch": asdict(epoch)})


def print_line(document: dict[str, Any]) -> None:
    print(LINE_MARK + json.dumps(document), flush=True)


def seldom(report: Callable[..., None], interval_s: float = 0.2) -> Callable[..., None]:
    """The same report, at most once an interval, and always of the last step."""
    last_s = 0.0

    def reported(stage: str, done: float, total: float, text: str = "") -> None:
        nonlocal last_s
        if done >= total or time.monotonic() - last_s >= interval_s:
            last_s = time.monotonic()
            report(stage, done, total, text)

    return reported


def end_with(parent: int) -> None:
    """Ends this process once the one that asked for the training is gone."""
    while Path(f"/proc/{parent}").exists():
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
