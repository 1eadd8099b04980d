"""Stage ``preflight``: asks a target what it is, and refuses what cannot work there before any training."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.load import fallback_recipes
from jetway.configs.schema import BenchmarkConfig, EngineName, Precision, Recipe, Target
from jetway.tasks.contract import BF16_OPSET, contract_of
from jetway.tasks.errors import TargetBusyError, TargetMismatchError
from jetway.tasks.remote import RETRY_DELAYS_S, is_unreachable
from jetway.tasks.requirements import engine_problems, power_mode_problems, power_problems, trtexec_problems
from jetway.tasks.stage import StageContext
from jetway.tasks.target.jobs import owner
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.target_info import TargetInfo

logger = logging.getLogger("jetway")

OLDEST_PYTHON = (3, 6)
PROBE_TIMEOUT_S = 60.0


def probe_target(session: TargetSession, benchmark: BenchmarkConfig | None = None) -> TargetInfo:
    """What the target is and can do, and whether its power can be set as ``benchmark`` and the target's file ask."""
    request = session.target.power_settings(benchmark or BenchmarkConfig())
    return TargetInfo.model_validate(session.call("probe", request, timeout_s=PROBE_TIMEOUT_S))


def check_free(target: Target, info: TargetInfo) -> None:
    """Raises TargetBusyError where nobody wants to wait, and a job of another process holds the accelerator."""
    holder = info.holders.get(target.leased_engine)
    if target.busy_timeout_s or not holder or holder.get("owner") == owner():
        return
    raise TargetBusyError(
        f"{target.name}: {info.accelerators[target.leased_engine]} is held by job {holder.get('job')} of "
        f"{holder.get('owner') or 'an older Jetway'} since {holder.get('since')}, and busy_timeout_s is 0. "
        "Try again later, or wait: --busy-timeout-s 600."
    )


def check_target(recipe: Recipe, target: Target, info: TargetInfo) -> None:
    """Raises TargetMismatchError with all that stands in the recipe's way, each with the key to change."""
    problems = [
        *_python_problems(target, info),
        *engine_problems(recipe, target, info),
        *power_mode_problems(recipe, target, info),
        *power_problems(recipe, info),
        *trtexec_problems(recipe, info),
        *_room_problems(target, info),
        *_thread_problems(recipe, info),
    ]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise TargetMismatchError(f"Target {target.name} ({info.machine}) cannot run this recipe:{lines}")
    for warning in doubts(recipe, target, info):
        logger.warning("%s: %s", target.name, warning)
    on_cpu = target.engine is EngineName.ONNXRUNTIME
    if on_cpu and _has_int8(recipe) and not info.cpu.int8_instruction_sets:
        logger.warning("%s has no int8 instructions: int8 variants may be slower than fp32.", target.name)


def warn_of_fallbacks(recipe: Recipe, target: Target, info: TargetInfo) -> None:
    """Says at once which fallbacks of the recipe cannot run there; the others may still pass."""
    for name, other in fallback_recipes(recipe).items():
        try:
            check_target(other, target, info)
        except TargetMismatchError as exc:
            logger.warning("plan_b %s will fail there: %s", name, exc)


def doubts(recipe: Recipe, target: Target, info: TargetInfo) -> list[str]:
    """What may fail there, and no document says that it does."""
    own = [v for v in recipe.variants if target.backend(v).engine is EngineName.TENSORRT]
    parser = contract_of(info).parser
    bf16 = any(variant.precision is Precision.BF16 for variant in own)
    if not bf16 or parser is None or parser.max_opset >= BF16_OPSET:
        return []
    return [
        f"bf16 models are written in ONNX opset {BF16_OPSET}, and the parser of this TensorRT is known to take "
        f"{parser.max_opset} ({parser.source}). If their build fails, use fp16."
    ]


def _has_int8(recipe: Recipe) -> bool:
    return any(variant.precision.has_quantizers for variant in recipe.variants)


def _python_problems(target: Target, info: TargetInfo) -> list[str]:
    if tuple(int(part) for part in info.python.split(".")[:2]) >= OLDEST_PYTHON:
        return []
    return [
        f"python: {target.python} is Python {info.python}; 3.6 is the oldest that works. Name a newer one."
    ]


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
        info = probe_target(session, recipe.benchmark)
    check_free(target, info)
    check_target(recipe, target, info)
    warn_of_fallbacks(recipe, target, info)
    return info
