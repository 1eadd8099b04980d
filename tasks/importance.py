"""What the workload's own loss says of a network: gradients that rank channels, and the cost of a change.

All of it on a fixed choice of training samples, drawn from the seed, in eval mode: BatchNorm and dropout act as
they will when the network is deployed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jetway.configs.schema import Importance, PruneConfig
from jetway.tasks.channels import Candidate, find_candidates, make_importance
from jetway.tasks.dependencies import trace_dependencies
from jetway.tasks.errors import PruningError
from jetway.tasks.stage import StageContext
from jetway.tasks.training import to_device, users_code
from jetway.tasks.workload import Inputs, Workload, call_network

BATCH_SIZE = 64


def rank_candidates(
    context: StageContext, network: nn.Module, config: PruneConfig, ignored: frozenset[str]
) -> list[Candidate]:
    """Groups of channels that may go, ranked by ``config.importance``. Raises PruningError when there are none."""
    prepare_gradients(context, network, config)
    inputs, names = context.workload.example_inputs(), context.workload.output_names
    graph = trace_dependencies(network, inputs, names)
    candidates = find_candidates(network, graph, make_importance(config.importance), ignored)
    if not candidates:
        raise PruningError(
            f"Nothing can be pruned by importance {config.importance}: every group of layers is "
            "ignored, makes an output, or has nothing to rank by. Ignore fewer, or rank by l2."
        )
    return candidates


def prepare_gradients(context: StageContext, network: nn.Module, config: PruneConfig) -> None:
    """Leaves in the parameters' ``grad`` what the importance reads there, if it reads anything."""
    samples = config.calibration_batches * BATCH_SIZE
    if config.importance is Importance.TAYLOR:
        accumulate_gradients(network, context, samples=samples)
    elif config.importance is Importance.HESSIAN:
        average_squared_gradients(network, context, samples=samples)


def accumulate_gradients(network: nn.Module, context: StageContext, *, samples: int) -> None:
    """Leaves the gradients of the loss over some training samples in the network's parameters."""
    network.zero_grad()
    for batch in training_batches(context, samples, BATCH_SIZE):
        _backward(network.to(context.device).eval(), context.workload, batch)
    _complete_gradients(network)


def average_squared_gradients(network: nn.Module, context: StageContext, *, samples: int) -> None:
    """Leaves the mean of each sample's squared gradient in the parameters: the empirical Fisher information.

    It stands for the diagonal of the loss's Hessian (LeCun, Denker & Solla 1990, "Optimal Brain Damage"). One
    backward pass a sample, and twice the memory of the gradients.
    """
    network.to(context.device).eval()
    sums = [torch.zeros_like(parameter) for parameter in network.parameters()]
    count = 0
    for batch in training_batches(context, samples, 1):
        network.zero_grad()
        _backward(network, context.workload, batch)
        for total, parameter in zip(sums, network.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad**2
        count += 1
    for total, parameter in zip(sums, network.parameters(), strict=True):
        parameter.grad = total / count
    _complete_gradients(network)


def mean_loss(network: nn.Module, context: StageContext, batches: list[tuple[Inputs, Any]]) -> float:
    """The workload's loss, the mean over batches. Raises PruningError when it is not finite."""
    network.to(context.device).eval()
    with torch.no_grad(), users_code(context.workload, "the loss on training data"):
        losses = [float(_loss(network, context.workload, batch)) for batch in batches]
    if not math.isfinite(sum(losses)):
        raise PruningError(
            "The loss of the network as it came is not finite on the training data, so nothing can be ranked by "
            "it. Look for NaN in the checkpoint and in train_data()."
        )
    return math.fsum(losses) / len(losses)


def training_batches(context: StageContext, samples: int, batch_size: int) -> Iterator[tuple[Inputs, Any]]:
    """Batches of training samples, on the context's device; the same ones for the same seed."""
    workload = context.workload
    with users_code(workload, "its training data"):
        data = workload.train_data()
        count = len(data)  # type: ignore[arg-type]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(context.seed)).tolist()[:samples]
    for start in range(0, len(chosen), batch_size):
        with users_code(workload, "its training data"):
            batch = workload.collate([data[i] for i in chosen[start : start + batch_size]])
        yield to_device(batch, context.device)


def _loss(network: nn.Module, workload: Workload, batch: tuple[Inputs, Any]) -> Tensor:
    inputs, target = batch
    return workload.loss(call_network(network, inputs, workload.output_names), target)


def _backward(network: nn.Module, workload: Workload, batch: tuple[Inputs, Any]) -> None:
    with users_code(workload, "the loss on training data"):
        _loss(network, workload, batch).backward()  # type: ignore[no-untyped-call]


def _complete_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    network.to("cpu")
