"""What a forward pass costs: multiply-accumulates (MACs), parameters and bytes.

Counted are convolutions, linear layers, matrix products, scaled dot-product attention (its two products) and
recurrent layers, where PyTorch executes them, so functional calls count too. Not counted: biases,
normalization, activations, pooling, softmax and element-wise work. A MAC is one multiplication and one
addition: half of the operations that PyTorch's own counter reports.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jetway.tasks.workload import Inputs, plain_kernels

aten = torch.ops.aten


def count_macs(network: nn.Module, inputs: Inputs) -> dict[str, int]:
    """MACs of one call, by module and less those of its submodules, so that they sum to the total.

    The network's own name is ``""``. ``network`` must be in eval mode; ``inputs`` go in by position.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_OPERATORS)
    with torch.no_grad(), plain_kernels(), counter:
        network(*inputs.values())
    return _less_children(_macs_by_name(network, counter))


def total_macs(network: nn.Module, inputs: Inputs) -> int:
    """MACs of one call; see ``count_macs``."""
    return sum(count_macs(network, inputs).values())


def count_params(module: nn.Module, *, recurse: bool = True) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters(recurse))


def weight_bytes(module: nn.Module, *, recurse: bool = True) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _macs_by_name(network: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    root = type(network).__name__
    counts = counter.get_flop_counts()
    inclusive = {
        name.removeprefix(root).removeprefix("."): sum(operators.values()) // 2
        for name, operators in counts.items()
        if name == root or name.startswith(f"{root}.")
    }
    return {"": counter.get_total_flops() // 2, **inclusive}


def _less_children(inclusive: dict[str, int]) -> dict[str, int]:
    own = dict(inclusive)
    for name, macs in inclusive.items():
        if name:
            own[_nearest_ancestor(name, inclusive)] -= macs
    return own


def _nearest_ancestor(name: str, names: dict[str, int]) -> str:
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            break
    return name


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Query times keys, and the weights times values; shapes are [batch, heads, length, dims]."""
    return int(2 * math.prod(query[:3]) * key[2] * (query[3] + value[3]))


def _recurrent_layer(x: Any, w_input: Any, w_hidden: Any, *args: Any, **kwargs: Any) -> int:
    """``x`` is [time, batch, features]; the weights hold all gates."""
    return int(2 * x[0] * x[1] * (math.prod(w_input) + math.prod(w_hidden)))


def _matrix_vector(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(math.prod(matrix))


# Operators of the CPU that PyTorch's counter does not know; like its own formulas, two operations a MAC.
_CPU_OPERATORS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mkldnn_rnn_layer: _recurrent_layer,
    aten.mv: _matrix_vector,
}
