"""Processes that train side by side: what each of them takes, and what all of them agree on.

Alone, every function is the identity. Under torchrun the processes form a group: NCCL where each has a GPU
of its own, gloo on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``count`` processes."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th item, from this process's own number on."""
        return items[self.rank :: self.count]

    def gather(self, own: list[T]) -> list[T]:
        """The items that ``share`` dealt out, of all processes, in their first order."""
        if self.count == 1:
            return own
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, own)
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers: the statistics of BatchNorm are each one's own."""
        if self.count > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)

    def joined(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over all processes; parameters may stay unused."""
        if self.count == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        return nn.parallel.DistributedDataParallel(network, static_graph=True)


def in_group() -> bool:
    """Whether torchrun started this process, and it joined the others."""
    return distributed.is_initialized()


def current_ranks() -> Ranks:
    """The group that this process belongs to."""
    if not in_group():
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the group that torchrun describes in the environment, with a GPU of its own where there is one."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield current_ranks()
    finally:
        distributed.destroy_process_group()
