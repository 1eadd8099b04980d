"""Analyze: what the baseline costs, module by module, and where the host spends its time on it."""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor, nn

from jetway.configs.schema import AnalyzeConfig
from jetway.tasks.artifacts import Checkpoint, Figure, StageOutput
from jetway.tasks.chart import add_chart, new_canvas
from jetway.tasks.checkpoint import load_network
from jetway.tasks.macs import count_macs, count_params, weight_bytes
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.workload import Inputs

WARMUP_RUNS = 3

# Most rows of the chart; the table has them all.
_CHARTED = 20


def analyze_network(context: StageContext, baseline: Checkpoint, config: AnalyzeConfig) -> StageOutput:
    """Parameters, MACs, bytes and latency of one call on the example inputs, by module and in total.

    ``activation_bytes`` is the sum of what the modules without submodules return;
    ``peak_activation_bytes`` is the largest input and output of any one of them together, which an executor
    must hold at least. Latency is the median over ``config.latency_runs`` on the host's CPU: it shows shares,
    not what the target will take.
    """
    network = load_network(context.workload, baseline, context.store)
    inputs = context.workload.example_inputs()
    latency_ms = _measure_latency_ms(network, inputs, config.latency_runs, context)
    rows = _module_rows(network, inputs, latency_ms)
    totals = _totals(network, rows)
    report = context.store.add_json(
        {
            "schema_version": 1,
            "measured_on": _host_cpu(),
            "latency_runs": config.latency_runs,
            "input_shapes": {name: list(tensor.shape) for name, tensor in inputs.items()},
            "totals": totals,
            "modules": rows,
        },
        parents=(baseline.sha256,),
    )
    chart = _add_chart(context, rows, totals, parent=baseline)
    metrics = {name: float(totals[name]) for name in ("params", "macs", "weight_bytes", "activation_bytes")}
    return StageOutput(handle=report, files={"analysis.json": report, "analysis.png": chart}, metrics=metrics)


@task(name="analyze", cache_policy=NO_CACHE, persist_result=False)
def analyze(context: StageContext, baseline: Checkpoint, config: AnalyzeConfig) -> StageOutput:
    return run_stage(
        context,
        "analyze",
        lambda ctx: analyze_network(ctx, baseline, config),
        inputs=[baseline],
        section=config,
    )


@dataclass(frozen=True)
class _Activation:
    """What a module without submodules returned, and that together with what it was given."""

    shape: list[int]
    returned_bytes: int
    touched_bytes: int


def _module_rows(network: nn.Module, inputs: Inputs, latency_ms: dict[str, float]) -> list[dict[str, Any]]:
    """One row a module that runs or holds weights itself; what its submodules do is in their rows."""
    macs, activations = count_macs(network, inputs), _record_activations(network, inputs)
    total_ms = sum(latency_ms.values())
    return [
        {
            "module": name,
            "type": type(module).__name__,
            "params": count_params(module, recurse=False),
            "macs": macs.get(name, 0),
            "weight_bytes": weight_bytes(module, recurse=False),
            "output_shape": activations[name].shape,
            "activation_bytes": activations[name].returned_bytes,
            "touched_bytes": activations[name].touched_bytes,
            "latency_ms": latency_ms.get(name, 0.0),
            "latency_share": latency_ms.get(name, 0.0) / total_ms,
        }
        for name, module in network.named_modules()
        if name in latency_ms or count_params(module, recurse=False)
    ]


def _totals(network: nn.Module, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "params": count_params(network),
        "macs": sum(row["macs"] for row in rows),
        "weight_bytes": weight_bytes(network),
        "activation_bytes": sum(row["activation_bytes"] for row in rows),
        "peak_activation_bytes": max(row["touched_bytes"] for row in rows),
        "latency_ms": sum(row["latency_ms"] for row in rows),
    }


def _record_activations(network: nn.Module, inputs: Inputs) -> dict[str, _Activation]:
    """Activations of the modules without submodules, by name; of the last call where there are several."""
    seen: dict[str, _Activation] = defaultdict(lambda: _Activation([], 0, 0))

    def record(name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        tensors = list(_tensors(returned))
        shape = list(tensors[0].shape) if tensors else []
        size = _size_bytes(tensors)
        seen[name] = _Activation(shape, size, size + _size_bytes(_tensors(given)))

    leaves = {name: m for name, m in network.named_modules() if not next(m.children(), None)}
    with _hooks([m.register_forward_hook(partial(record, name)) for name, m in leaves.items()]):
        _call(network, inputs)
    return seen


def _measure_latency_ms(
    network: nn.Module, inputs: Inputs, runs: int, context: StageContext
) -> dict[str, float]:
    """Median time of each module over the runs, less that of its submodules."""
    clock = _ModuleClock()
    samples: dict[str, list[float]] = defaultdict(list)
    with _hooks(list(clock.attach(network))):
        for run in range(WARMUP_RUNS + runs):
            clock.own_ns.clear()
            _call(network, inputs)
            context.progress("analyze", run + 1, WARMUP_RUNS + runs, "timing modules")
            for name, nanoseconds in clock.own_ns.items() if run >= WARMUP_RUNS else ():
                samples[name].append(nanoseconds / 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


class _ModuleClock:
    """Times nested calls by hooks: ``own_ns`` is what each module took, without the modules it called."""

    def __init__(self) -> None:
        self.own_ns: dict[str, int] = defaultdict(int)
        self._started: list[int] = []
        self._inner_ns: list[int] = [0]

    def attach(self, network: nn.Module) -> Iterator[Any]:
        for name, module in network.named_modules():
            yield module.register_forward_pre_hook(self._enter)
            yield module.register_forward_hook(partial(self._leave, name))

    def _enter(self, module: nn.Module, given: Any) -> None:
        self._inner_ns.append(0)
        self._started.append(time.perf_counter_ns())

    def _leave(self, name: str, module: nn.Module, given: Any, returned: Any) -> None:
        elapsed = time.perf_counter_ns() - self._started.pop()
        self.own_ns[name] += elapsed - self._inner_ns.pop()
        self._inner_ns[-1] += elapsed


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(network: nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        network(*inputs.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _host_cpu() -> str:
    return f"host CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _add_chart(
    context: StageContext, rows: list[dict[str, Any]], totals: dict[str, Any], *, parent: Checkpoint
) -> Figure:
    """Shares of latency and MACs of the modules that take longest, side by side."""
    shown = sorted(rows, key=lambda row: float(row["latency_ms"]), reverse=True)[:_CHARTED][::-1]
    labels = [f"{row['module'] or '(forward)'} · {row['type']}" for row in shown]
    canvas = new_canvas(11, 1.8 + 0.32 * len(shown))
    left, right = canvas.subplots(1, 2, sharey=True)
    _draw_bars(left, labels, [100 * row["latency_share"] for row in shown], "share of the latency, %")
    _draw_bars(
        right, labels, [100 * row["macs"] / max(1, totals["macs"]) for row in shown], "share of MACs, %"
    )
    canvas.suptitle(
        f"Baseline, measured on the {_host_cpu()}: {totals['latency_ms']:.2f} ms, "
        f"{totals['macs'] / 1e6:.1f} M MACs, {totals['params'] / 1e6:.2f} M parameters"
    )
    return add_chart(context.store, canvas, parents=(parent.sha256,))


def _draw_bars(axes: Any, labels: list[str], percent: list[float], title: str) -> None:
    bars = axes.barh(labels, percent, color="#33658a")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlabel(title)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
