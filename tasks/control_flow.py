"""Control flow that depends on values: an exported graph would keep the branch of the example inputs for ever."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jetway.tasks.errors import WorkloadError

# How Python gets at a tensor's values.
_READS = {
    Tensor.__bool__: "a branch or an assertion",
    Tensor.__int__: "int()",
    Tensor.__float__: "float()",
    Tensor.__index__: "an index or a size",
    Tensor.item: "item()",
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
}


def check_control_flow(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raises WorkloadError naming the module whose forward reads values that come from the inputs."""
    watcher = _ValueWatcher(inputs)
    hooks: list[Any] = []
    for name, module in network.named_modules():
        hooks.append(
            module.register_forward_pre_hook(lambda _module, _args, name=name: watcher.inside.append(name))
        )
        hooks.append(module.register_forward_hook(lambda *_: watcher.leave()))
    try:
        with torch.no_grad(), watcher:
            network(*inputs.values())
    finally:
        for hook in hooks:
            hook.remove()


class _ValueWatcher(TorchFunctionMode):
    """Follows what is computed from the inputs, and refuses that Python reads it."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.inside: list[str] = []
        # Kept alive, so that no other tensor gets the same id.
        self._derived: dict[int, Tensor] = {id(tensor): tensor for tensor in inputs.values()}

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        derived = any(id(tensor) in self._derived for tensor in _tensors([*args, *kwargs.values()]))
        if derived and func in _READS:
            raise WorkloadError(self._message(_READS[func]))
        result = func(*args, **kwargs)
        if derived:
            self._derived |= {id(tensor): tensor for tensor in _tensors([result])}
        return result

    def _message(self, read: str) -> str:
        where = (
            f"module {self.inside[-1]!r}" if self.inside and self.inside[-1] else "the network's own forward"
        )
        return (
            f"Control flow depends on values: {where} turns a tensor that is computed from the inputs into a Python "
            f"value, for {read}. An exported graph would keep what the example inputs gave. Use torch.where, masks "
            "or sizes instead, or move it to score_sample."
        )


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
