"""Export: a checkpoint as ONNX, checked, with explicit Q/DQ where the network is quantized.

The TorchScript exporter writes the graph, because ModelOpt's quantizers have their ONNX form there. Then
constants are folded, weights become int8, and BatchNorm goes into the weights and scales (``onnx_graph``).
The same checkpoint gives the same bytes.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.onnx import errors as onnx_errors
from torch.overrides import TorchFunctionMode

from jetway.configs.schema import ExportConfig, Precision, Section
from jetway.tasks.artifacts import Checkpoint, OnnxModel, StageOutput
from jetway.tasks.errors import ConfigError, ExportError, JetwayError
from jetway.tasks.onnx_graph import Graph, count_macs, fold_batchnorms, fold_constants
from jetway.tasks.quantization import load_variant
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.workload import Inputs, Workload, call_network

BATCH_AXIS = "batch"

# What the TorchScript exporter of PyTorch can write.
MAX_OPSET = 20
_MIN_INT8_OPSET = 13


class ExportKey(Section):
    """What an exported file depends on besides the checkpoint."""

    config: ExportConfig
    precision: Precision


def export_onnx(
    context: StageContext, checkpoint: Checkpoint, config: ExportConfig, precision: Precision
) -> StageOutput:
    """The ONNX model of a checkpoint; its ``metadata`` holds ``opset``, ``precision`` and ``macs``.

    Inputs and outputs carry the workload's names and the shapes of its example inputs; ``dynamic_batch``
    leaves their first dimension open. Raises ExportError naming the operator and the module that cannot be
    written, ConfigError for an opset that the exporter or int8 does not have.
    """
    _check_opset(config, precision)
    network = load_variant(context.workload, checkpoint, precision, context.store)
    with context.store.scratch() as folder:
        path = folder / "model.onnx"
        _write(network, context.workload, config, path)
        graph = Graph.load(path)
        fold_constants(graph)
        folded = fold_batchnorms(graph)
        _save_checked(graph, path)
        handle = context.store.add(
            OnnxModel,
            path,
            parents=(checkpoint.sha256,),
            metadata=_metadata(graph, config, precision) | {"batchnorms_folded": folded},
        )
    return StageOutput(handle=handle)


def onnx_node_names(workload: Workload, config: ExportConfig) -> list[str]:
    """Names of the nodes that any network of the workload is exported with: they follow its modules."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _write(workload.network(), workload, config, path)
        return [str(node.name) for node in onnx.load(path, load_external_data=False).graph.node]


@task(name="export", cache_policy=NO_CACHE, persist_result=False)
def export(
    context: StageContext, checkpoint: Checkpoint, config: ExportConfig, precision: Precision
) -> StageOutput:
    return run_stage(
        context,
        "export",
        lambda ctx: export_onnx(ctx, checkpoint, config, precision),
        inputs=[checkpoint],
        section=ExportKey(config=config, precision=precision),
    )


class _Named(nn.Module):
    """Returns the outputs as a tuple in the order of their names, whatever the network returns."""

    def __init__(self, network: nn.Module, workload: Workload) -> None:
        super().__init__()
        self.network = network
        self._input_names = workload.input_names()
        self._output_names = workload.output_names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self._input_names, tensors, strict=True))
        return tuple(call_network(self.network, inputs, self._output_names).values())


def _check_opset(config: ExportConfig, precision: Precision) -> None:
    least = _MIN_INT8_OPSET if precision.has_quantizers else 11
    if not least <= config.opset <= MAX_OPSET:
        raise ConfigError(
            f"export.opset is {config.opset}; {precision} can be exported with {least} to {MAX_OPSET}. "
            "17 suits TensorRT 8.5 and ONNX Runtime 1.12 and everything newer."
        )


def _write(network: nn.Module, workload: Workload, config: ExportConfig, path: Path) -> None:
    inputs = workload.example_inputs()
    names = [*inputs, *workload.output_names]
    with _translated(network, inputs, config), _quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            _Named(network, workload).eval(),
            tuple(inputs.values()),
            path,
            dynamo=False,
            opset_version=config.opset,
            input_names=list(inputs),
            output_names=list(workload.output_names),
            dynamic_axes={name: {0: BATCH_AXIS} for name in names} if config.dynamic_batch else None,
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says of itself, and what tracing says of ModelOpt's own code.

    When it fails it prints the whole graph on stdout, whatever its verbosity.
    """
    print_graph = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
        warnings.filterwarnings("ignore", module=r"torch\.onnx\b")
        warnings.filterwarnings("ignore", category=TracerWarning, module=r"modelopt\b")
        try:
            yield
        finally:
            torch._C._jit_onnx_log = print_graph


@contextmanager
def _translated(network: nn.Module, inputs: Inputs, config: ExportConfig) -> Iterator[None]:
    """Turns whatever the exporter raises into an ExportError with the operator and its module."""
    try:
        yield
    except JetwayError:
        raise
    except onnx_errors.UnsupportedOperatorError as exc:
        operator = re.search(r"'(\w+::\w+)'", str(exc))
        name = operator.group(1) if operator else "an operator"
        raise ExportError(
            f"ONNX opset {config.opset} has no form for {name}{_where(network, inputs, name)}. Write it with "
            f"other operators in the network's forward, or try a higher export.opset ({MAX_OPSET} at most)."
        ) from exc
    except Exception as exc:
        raise ExportError(
            f"The network cannot be traced into ONNX: {type(exc).__name__}: {_first_line(exc)}. Its forward "
            "must run on tensors alone, without branches or sizes that depend on their values."
        ) from exc


def _where(network: nn.Module, inputs: Inputs, operator: str) -> str:
    """Names the module whose forward calls the operator, when a plain call of the network shows it."""
    watcher = _OperatorWatcher(operator.partition("::")[2])
    handles = [
        hook
        for name, module in network.named_modules()
        for hook in (
            module.register_forward_pre_hook(lambda _module, _args, name=name: watcher.enter(name)),
            module.register_forward_hook(lambda *_: watcher.leave()),
        )
    ]
    try:
        with torch.no_grad(), watcher:
            network(*inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    return "" if watcher.found is None else f", used in {watcher.found or 'the network itself'}"


class _OperatorWatcher(TorchFunctionMode):
    """Remembers in which module a function of this name was first called."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self._function = function.strip("_")
        self._stack: list[str] = []
        self.found: str | None = None

    def enter(self, name: str) -> None:
        self._stack.append(name)

    def leave(self) -> None:
        self._stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.found is None and getattr(func, "__name__", "").strip("_") == self._function:
            self.found = self._stack[-1] if self._stack else ""
        return func(*args, **(kwargs or {}))


def _save_checked(graph: Graph, path: Path) -> None:
    try:
        model = onnx.shape_inference.infer_shapes(graph.to_model(), check_type=True, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(
            f"The exported graph is not valid ONNX: {_first_line(exc)}. Try another export.opset, and report "
            "the network's layer that the message names."
        ) from exc
    path.write_bytes(model.SerializeToString(deterministic=True))


def _metadata(graph: Graph, config: ExportConfig, precision: Precision) -> dict[str, Any]:
    shapes = graph.shapes()
    return {
        "opset": config.opset,
        "precision": str(precision),
        "dynamic_batch": config.dynamic_batch,
        "inputs": {name: list(shapes[name]) for name in graph.input_names},
        "outputs": {name: list(shapes.get(name, ())) for name in graph.output_names},
        "macs": sum(count_macs(node, shapes) for node in graph.nodes),
    }


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), "no message")[:300]
