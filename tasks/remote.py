"""What the stages that work on a target share: inputs for it, builds, and when to try again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from safetensors.torch import save_file

from jetway.configs.schema import Backend, BuildConfig, Precision, TensorRtConfig
from jetway.tasks.artifacts import Engine, Handle, OnnxModel, Tensors
from jetway.tasks.calibration import calibration_batches
from jetway.tasks.engine_options import engine_options
from jetway.tasks.errors import TargetUnreachableError
from jetway.tasks.stage import Progress, StageContext, seed_everything, stage_seed
from jetway.tasks.target.session import TargetSession
from jetway.tasks.target.transfer import TransferProgress
from jetway.tasks.workload import Inputs

#: Attempts after a lost connection, and the seconds before each.
RETRIES = 3
RETRY_DELAYS_S = [2.0, 8.0, 30.0]

# Smaller files are there before a line about them could be read.
SHOWN_BYTES = 1_000_000

# Builds run side by side in threads, and the seeds are the process's.
_seeded = threading.Lock()


def is_unreachable(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed for the one reason that a retry may help with."""
    try:
        state.result()
    except TargetUnreachableError:
        return True
    except Exception:
        return False
    return False


def relay(progress: Progress, stage: str) -> Callable[[dict[str, Any]], None]:
    """Hands the target's progress lines on as the host's."""

    def on_progress(line: dict[str, Any]) -> None:
        progress(stage, line.get("done", 0.0), line.get("total", 1.0), line.get("text", ""))

    return on_progress


def relay_transfer(progress: Progress, stage: str, verb: str) -> TransferProgress:
    """Shows the bytes of a transfer as the stage's progress."""

    def on_progress(done: int, size: int) -> None:
        if size >= SHOWN_BYTES:
            progress(stage, done, size, f"{verb} {size / 1e6:.1f} MB")

    return on_progress


def push_handle(context: StageContext, session: TargetSession, handle: Handle, *, stage: str) -> str:
    """The handle's file on the target, checked on both sides."""
    shown = relay_transfer(context.progress, stage, "sending")
    return session.push(handle, context.store.open(handle), shown)


def pull_file(
    context: StageContext, session: TargetSession, remote_path: str, path: Path, *, sha256: str, stage: str
) -> None:
    """Fetches a file from the target and checks its digest."""
    session.pull(remote_path, path, sha256, relay_transfer(context.progress, stage, "receiving"))


def save_inputs(context: StageContext, inputs: Inputs) -> Tensors:
    """Named inputs as a file in the store. The same inputs give the same file."""
    with context.store.scratch() as folder:
        path = folder / "inputs.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in inputs.items()}, path)
        return context.store.add(Tensors, path)


def example_inputs(context: StageContext) -> Tensors:
    """The workload's example inputs, drawn from the recipe's seed."""
    with _seeded:
        seed_everything(stage_seed(context.seed, "example_inputs"))
        inputs = context.workload.example_inputs()
    return save_inputs(context, inputs)


def build_on_target(
    context: StageContext,
    session: TargetSession,
    onnx: OnnxModel,
    inputs: Tensors,
    config: BuildConfig,
    tensorrt: TensorRtConfig,
    backend: Backend,
    *,
    stage: str,
) -> Engine:
    """Builds the ONNX file on the target, or finds what an earlier build made of it, and pulls the engine.

    The ONNX handle's metadata says its ``precision``, fp32 without that. The engine's metadata is its passport, plus
    ``remote_path``, ``reused`` and ``target``.
    """
    precision = Precision(onnx.metadata.get("precision", Precision.FP32))
    batches = _push_calibration(context, session, precision, tensorrt, stage=stage)
    request = {
        "engine": str(backend.engine),
        "options": engine_options(backend, precision, tensorrt, batches),
        "onnx": push_handle(context, session, onnx, stage=stage),
        "onnx_sha256": onnx.sha256,
        "inputs": push_handle(context, session, inputs, stage=stage),
        "threads": config.threads,
        "revision": config.revision,
        "provenance": {"parents": list(onnx.parents), "metadata": onnx.metadata},
    }
    result = session.run_job(
        "build", request, timeout_s=config.timeout_s, on_progress=relay(context.progress, stage)
    )
    return _pull_engine(context, session, onnx, result, stage=stage)


def _push_calibration(
    context: StageContext,
    session: TargetSession,
    precision: Precision,
    config: TensorRtConfig,
    *,
    stage: str,
) -> list[str]:
    """Paths on the target of the batches that TensorRT's own calibrator reads; none for other precisions."""
    if precision is not Precision.INT8_CALIBRATED:
        return []
    batches = calibration_batches(
        context.workload, config.calibration.samples, config.calibration.calibration_set
    )
    return [push_handle(context, session, save_inputs(context, batch), stage=stage) for batch in batches]


def _pull_engine(
    context: StageContext,
    session: TargetSession,
    onnx: OnnxModel,
    result: Mapping[str, Any],
    *,
    stage: str,
) -> Engine:
    passport = result["passport"]
    engine = Engine(
        sha256=passport["engine_sha256"],
        size_bytes=passport["engine_size_bytes"],
        parents=(onnx.sha256,),
        metadata={
            **passport,
            "remote_path": result["engine"],
            "reused": result["reused"],
            "target": session.target.name,
        },
    )
    if not context.store.has(engine):
        with context.store.scratch() as folder:
            path = folder / "pulled.engine"
            pull_file(context, session, result["engine"], path, sha256=engine.sha256, stage=stage)
            context.store.add(Engine, path)
    return engine.model_copy(update={"uri": context.store.path_of(engine).as_uri()})
