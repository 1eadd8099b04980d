"""Control flow and shapes that depend on values: an exported graph would keep those of the example inputs for ever."""

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
    Tensor.__array__: "a NumPy array",
}

# What gives as many elements as the values make it.
_GATHERS = {
    torch.nonzero: "nonzero",
    Tensor.nonzero: "nonzero",
    torch.argwhere: "argwhere",
    Tensor.argwhere: "argwhere",
    torch.masked_select: "masked_select",
    Tensor.masked_select: "masked_select",
    torch.unique: "unique",
    Tensor.unique: "unique",
    torch.unique_consecutive: "unique_consecutive",
    Tensor.unique_consecutive: "unique_consecutive",
}


def check_control_flow(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raises WorkloadError naming the module whose forward reads values that come from the inputs, or makes shapes
    of them."""
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
    """Follows what is computed from the inputs, and refuses that Python reads it or that shapes follow from it."""

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
        given = [*args, *kwargs.values()]
        derived = self._is_derived(given)
        if derived and func in _READS:
            raise WorkloadError(self._read_message(_READS[func]))
        if derived and (gathering := self._gathering(func, given)):
            raise WorkloadError(self._shape_message(gathering))
        result = func(*args, **kwargs)
        if derived:
            self._derived |= {id(tensor): tensor for tensor in _tensors([result])}
        return result

    def _is_derived(self, values: Any) -> bool:
        return any(id(tensor) in self._derived for tensor in _tensors(values))

    def _gathering(self, func: Any, given: list[Any]) -> str | None:
        """The words for a call whose result has a shape by values. A mask that is a constant has one shape for ever."""
        if func is torch.where:
            return "where with nothing but a condition" if len(given) == 1 else None
        if func is Tensor.__getitem__:
            masks = [tensor for tensor in _tensors(given[1:]) if tensor.dtype in (torch.bool, torch.uint8)]
            return "an index by a mask" if self._is_derived(masks) else None
        return _GATHERS.get(func)

    @property
    def _where(self) -> str:
        return (
            f"module {self.inside[-1]!r}" if self.inside and self.inside[-1] else "the network's own forward"
        )

    def _read_message(self, read: str) -> str:
        return (
            f"Control flow depends on values: {self._where} turns a tensor that is computed from the inputs into a "
            f"Python value, for {read}. An exported graph would keep what the example inputs gave. Use torch.where, "
            "masks or sizes instead, or move it to score_sample."
        )

    def _shape_message(self, gathering: str) -> str:
        return (
            f"Shapes depend on values: {self._where} uses {gathering} on what is computed from the inputs, which gives "
            "another number of elements for other inputs. An engine has fixed shapes: multiply by the mask, use "
            "torch.where(condition, a, b), take a fixed number by topk, or move it to score_sample."
        )


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
