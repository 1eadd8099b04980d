"""Stage ``build``: an engine from an ONNX file, made on the target by the target's own engine builder."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import Backend, BuildConfig, Target, TensorRtConfig
from jetway.tasks.artifacts import Engine, OnnxModel
from jetway.tasks.remote import (
    RETRIES,
    RETRY_DELAYS_S,
    build_on_target,
    example_inputs,
    is_unreachable,
)
from jetway.tasks.stage import StageContext
from jetway.tasks.target.session import TargetSession, open_target


def build_engine(
    context: StageContext,
    session: TargetSession,
    onnx: OnnxModel,
    config: BuildConfig,
    tensorrt: TensorRtConfig | None = None,
    *,
    backend: Backend | None = None,
    variant: str = "",
) -> Engine:
    """Builds, loads and runs the engine once on the target; its passport is the handle's metadata.

    ``backend`` is the target's own unless given, ``tensorrt`` the defaults of that section. An engine that the
    target made earlier from the same ONNX file, with the same options, on the same machine, is used again when
    it still matches its passport; a raised ``revision`` builds anew. Raises BuildError with its cause.
    """
    return build_on_target(
        context,
        session,
        onnx,
        example_inputs(context),
        config,
        tensorrt or TensorRtConfig(),
        backend or session.target.own_backend,
        stage=stage_name(variant, session.target.name),
    )


def stage_name(variant: str, target: str) -> str:
    return f"build {variant} on {target}".replace("  ", " ")


@task(
    name="build",
    task_run_name="build {variant} on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def build(
    context: StageContext,
    target: Target,
    onnx: OnnxModel,
    config: BuildConfig,
    tensorrt: TensorRtConfig,
    *,
    backend: Backend,
    variant: str,
) -> Engine:
    with context.timed(stage_name(variant, target.name)), open_target(target) as session:
        return build_engine(context, session, onnx, config, tensorrt, backend=backend, variant=variant)
