"""Fine-tune: trains a pruned network on, from its own weights, with the baseline as an optional teacher."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import FinetuneConfig
from jetway.tasks.artifacts import Checkpoint, StageOutput
from jetway.tasks.checkpoint import checkpoint_record, load_network, save_checkpoint
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.training import train


def finetune_network(
    context: StageContext, pruned: Checkpoint, config: FinetuneConfig, teacher: Checkpoint | None
) -> StageOutput:
    """The pruned network with its best weights, never worse than it came, and the history of the epochs.

    ``teacher`` is used when ``config.distillation`` is set, which needs it (ConfigError).
    Raises TrainingError when the loss is not finite.
    """
    workload, store = context.workload, context.store
    teachers = [teacher] if teacher and config.distillation else []
    network = load_network(workload, pruned, store)
    result = train(
        network,
        workload,
        config,
        context=context,
        data=workload.train_data(),
        teacher=load_network(workload, teachers[0], store) if teachers else None,
        stage="finetune",
    )
    handle = save_checkpoint(
        store,
        network,
        structure=checkpoint_record(store.open(pruned)).structure,
        parents=tuple(parent.sha256 for parent in [pruned, *teachers]),
        metadata={"stage": "pruned", "best_epoch": result.best_epoch},
    )
    history = store.add_json(result.to_json(), parents=(handle.sha256,))
    return StageOutput(handle=handle, files={"finetune_history.json": history}, metrics=result.metrics)


@task(name="finetune", cache_policy=NO_CACHE, persist_result=False)
def finetune(
    context: StageContext, pruned: Checkpoint, config: FinetuneConfig, teacher: Checkpoint | None
) -> StageOutput:
    return run_stage(
        context,
        "finetune",
        lambda ctx: finetune_network(ctx, pruned, config, teacher),
        inputs=[pruned, *([teacher] if teacher and config.distillation else [])],
        section=config,
    )
