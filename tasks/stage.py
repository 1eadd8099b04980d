"""What every host stage shares: its context, its key, and the reuse of a result by content."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from jetway.configs.schema import Section, WorkloadConfig
from jetway.tasks.artifacts import Handle, StageOutput, json_sha256
from jetway.tasks.store import Store, jetway_home
from jetway.tasks.workload import Workload

logger = logging.getLogger("jetway")


class Progress(Protocol):
    """Called as work goes on; ``done`` of ``total`` steps of a stage, and a word on the current one."""

    def __call__(self, stage: str, done: float, total: float, text: str = "") -> None: ...


def no_progress(stage: str, done: float, total: float, text: str = "") -> None:
    pass


class StageIndex(Protocol):
    """Finished stages by key, shared by all workers. ``find`` also brings the files into the store."""

    def find(self, key: str) -> StageOutput | None: ...

    def record(self, key: str, stage: str, output: StageOutput, seconds: float) -> None: ...


@dataclass(frozen=True)
class FinishedStage:
    """A stage that ended, on this process's monotonic clock."""

    name: str
    started_s: float
    ended_s: float
    cached: bool

    @property
    def seconds(self) -> float:
        return self.ended_s - self.started_s


class StageContext:
    """What a stage may use besides its handles and its section.

    A plain class on purpose: Prefect walks into dataclasses and models that it is given, and must not here.
    """

    def __init__(
        self,
        workload: Workload,
        store: Store,
        *,
        workload_config: WorkloadConfig | None = None,
        workload_digest: str = "",
        seed: int = 0,
        threads: int | None = None,
        index: StageIndex | None = None,
        progress: Progress = no_progress,
        on_finish: Callable[[FinishedStage], None] | None = None,
        work_dir: Path | None = None,
    ) -> None:
        self.workload = workload
        self.store = store
        #: How another process makes the same workload; None where there is no recipe.
        self.workload_config = workload_config
        self.workload_digest = workload_digest
        self.seed = seed
        self.threads = threads or os.cpu_count() or 1
        self.index = index
        self.progress = progress
        self.on_finish = on_finish
        self.label = ""
        #: Stages in the order in which they finished.
        self.finished: list[FinishedStage] = []
        #: Folder for what a stage needs to resume after a kill; it outlives the process, not the stage.
        self.work_dir = work_dir or jetway_home() / "work" / "unkeyed"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def labelled(self, label: str) -> StageContext:
        """The same context for the stages of one variant: the label stands behind the stage's name."""
        return self._with(label=label)

    def for_stage(self, key: str) -> StageContext:
        """The same context with a work folder of its own, named by the stage's key."""
        return self._with(work_dir=jetway_home() / "work" / key[:32])

    def _with(self, **changes: Any) -> StageContext:
        other = StageContext.__new__(StageContext)
        other.__dict__.update(self.__dict__, **changes)
        return other

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Counts the block as a stage of its own; for what is never reused, such as measurements."""
        started_s = time.monotonic()
        yield
        self.finish(stage, started_s, cached=False)

    def finish(self, stage: str, started_s: float, *, cached: bool) -> FinishedStage:
        """Notes a stage as ended now. What is logged of it afterwards counts as tracking."""
        ended = FinishedStage(f"{stage} {self.label}".strip(), started_s, time.monotonic(), cached)
        self.finished.append(ended)
        if self.on_finish:
            self.on_finish(ended)
        return ended


def stage_key(context: StageContext, stage: str, inputs: Sequence[Handle], section: Section) -> str:
    """Key of a stage's result: what goes in, what is asked for, and nothing of where or when."""
    return json_sha256(
        {
            "stage": stage,
            "inputs": [handle.sha256 for handle in inputs],
            "section": section.model_dump(mode="json"),
            "workload": context.workload_digest,
            "seed": context.seed,
        }
    )


def run_stage(
    context: StageContext,
    stage: str,
    produce: Callable[[StageContext], StageOutput],
    *,
    inputs: Sequence[Handle],
    section: Section,
) -> StageOutput:
    """Returns the recorded result of the same stage on the same content, or runs it and records it."""
    key = stage_key(context, stage, inputs, section)
    found = context.index.find(key) if context.index is not None else None
    started_s = time.monotonic()
    if found is not None:
        logger.info("%s: unchanged, result %s reused", stage, found.handle.sha256[:12])
        context.finish(stage, started_s, cached=True)
        return found
    own = context.for_stage(key)
    seed_everything(stage_seed(context.seed, stage))
    torch.set_num_threads(context.threads)
    output = produce(own)
    seconds = context.finish(stage, started_s, cached=False).seconds
    if context.index is not None:
        context.index.record(key, stage, output, seconds)
    shutil.rmtree(own.work_dir, ignore_errors=True)
    logger.info("%s: done in %.1f s", stage, seconds)
    return output


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for each stage, so that a stage gives the same result whatever ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{stage}".encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
