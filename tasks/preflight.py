"""Stage ``preflight``: asks a target what it is, and refuses what cannot work there before any training."""

from __future__ import annotations

import logging
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from jetway.configs.schema import EngineName, Precision, Recipe, Target
from jetway.tasks.errors import TargetMismatchError
from jetway.tasks.remote import RETRY_DELAYS_S, is_unreachable
from jetway.tasks.stage import StageContext
from jetway.tasks.target.session import TargetSession, open_target

logger = logging.getLogger("jetway")

OLDEST_PYTHON = (3, 6)
PROBE_TIMEOUT_S = 60.0


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CpuInfo(_Facts):
    model: str
    architecture: str
    instruction_sets: tuple[str, ...]
    int8_instruction_sets: tuple[str, ...] = Field(
        description="Those that multiply int8 and add in one step (VNNI, AMX, dot product)."
    )


class EngineInfo(_Facts):
    """An engine on the target, or the reason why it is not there."""

    available: bool
    version: str | None = None
    providers: tuple[str, ...] = ()
    max_opset: int | None = None
    reason: str = ""


class MemoryInfo(_Facts):
    total: float | None
    available: float | None


class TargetInfo(_Facts):
    """What ``probe`` found. Memory and disk are in MiB; what could not be read is None."""

    schema_version: int
    hostname: str
    os: str
    kernel: str
    python: str
    board: str | None
    l4t: str | None
    boot_id: str
    cpu: CpuInfo
    cores: int
    memory_mib: MemoryInfo
    free_disk_mib: float
    frequencies_mhz: dict[str, Any]
    accelerators: dict[str, str]
    engines: dict[str, EngineInfo]

    @property
    def machine(self) -> str:
        """The board or the CPU, with what it has for int8."""
        int8 = ", ".join(self.cpu.int8_instruction_sets) or "no int8 instructions"
        return f"{self.board or self.cpu.model} ({self.cpu.architecture}, {self.cores} cores, {int8})"


def probe_target(session: TargetSession) -> TargetInfo:
    """What the target is and can do."""
    return TargetInfo.model_validate(session.call("probe", {}, timeout_s=PROBE_TIMEOUT_S))


def check_target(recipe: Recipe, target: Target, info: TargetInfo) -> None:
    """Raises TargetMismatchError with all that stands in the recipe's way, each with the key to change."""
    problems = [
        *_python_problems(target, info),
        *_engine_problems(recipe, target, info),
        *_room_problems(target, info),
        *_thread_problems(recipe, info),
    ]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise TargetMismatchError(f"Target {target.name} ({info.machine}) cannot run this recipe:{lines}")
    if _has_int8(recipe) and not info.cpu.int8_instruction_sets:
        logger.warning("%s has no int8 instructions: int8 variants may be slower than fp32.", target.name)


def _has_int8(recipe: Recipe) -> bool:
    return any(variant.precision is not Precision.FP32 for variant in recipe.variants)


def _python_problems(target: Target, info: TargetInfo) -> list[str]:
    if tuple(int(part) for part in info.python.split(".")[:2]) >= OLDEST_PYTHON:
        return []
    return [
        f"python: {target.python} is Python {info.python}; 3.6 is the oldest that works. Name a newer one."
    ]


def _engine_problems(recipe: Recipe, target: Target, info: TargetInfo) -> list[str]:
    if target.engine is not EngineName.ONNXRUNTIME:
        return [f"engine: {target.engine} engines are not built by this version. Set engine: onnxruntime."]
    engine = info.engines[target.engine]
    if not engine.available:
        return [f"engine: {target.engine} is not there for {target.python}. {engine.reason}"]
    if engine.max_opset is not None and recipe.export.opset > engine.max_opset:
        return [
            f"export.opset: {recipe.export.opset} is too new for onnxruntime {engine.version}, which takes "
            f"up to {engine.max_opset}. Set export.opset={engine.max_opset}, or install a newer one."
        ]
    return []


def _room_problems(target: Target, info: TargetInfo) -> list[str]:
    problems = []
    if info.free_disk_mib < target.min_free_disk_mib:
        problems.append(
            f"work_dir: {info.free_disk_mib:.0f} MiB of disk are free, and min_free_disk_mib is "
            f"{target.min_free_disk_mib}. Free some, or set work_dir to a folder on a larger disk."
        )
    available = info.memory_mib.available
    if available is not None and available < target.min_free_memory_mib:
        problems.append(
            f"min_free_memory_mib: {available:.0f} MiB of memory are free, and it asks for "
            f"{target.min_free_memory_mib}. Stop what else runs there, or lower it."
        )
    return problems


def _thread_problems(recipe: Recipe, info: TargetInfo) -> list[str]:
    if recipe.build.threads <= info.cores:
        return []
    return [
        f"build.threads: {recipe.build.threads} threads on {info.cores} cores measure the scheduler. "
        f"Set build.threads={info.cores} or less."
    ]


@task(
    name="preflight",
    task_run_name="preflight {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    # Nothing is lost yet, and somebody who mistyped a port is waiting.
    retries=1,
    retry_delay_seconds=RETRY_DELAYS_S[0],
    retry_condition_fn=is_unreachable,
)
def preflight(context: StageContext, target: Target, recipe: Recipe) -> TargetInfo:
    with context.timed(f"preflight {target.name}"), open_target(target) as session:
        info = probe_target(session)
    check_target(recipe, target, info)
    return info
