"""What a user brings: one class with the network, its data, its loss and its metrics.

A recipe names it by import path, ``my_package.my_module:MyWorkload``; the keys of ``workload.options`` are
its constructor's keyword arguments. Jetway adds nothing to the network and never pickles it.
"""

from __future__ import annotations

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from jetway.configs.schema import DEFAULT_CALIBRATION_SET, WorkloadConfig
from jetway.tasks.artifacts import json_sha256
from jetway.tasks.control_flow import check_control_flow
from jetway.tasks.errors import ConfigError, WorkloadError
from jetway.tasks.frames import FrameProcessing
from jetway.tasks.metrics import Metric
from jetway.tasks.sources import describe_error, find_workload, source_digests

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Record = dict[str, Any]
# One sample of a data set: the named inputs without their batch dimension, and the target.
Sample = tuple[Inputs, Any]


class Workload(ABC):
    """Base class of a user's workload.

    Inputs are named, of any number and dtype; the network is called with them by position, in the order of
    ``example_inputs``. Its outputs (a tensor, a tuple or a dict) take the names in ``output_names``.
    The first of ``metrics`` is the one that stages choose by: early stop, the best epoch, the accuracy drop.
    ``labels`` name the classes of a classifier, in the order of its outputs, for who runs it on the device.
    """

    output_names: tuple[str, ...] = ("output",)
    metrics: tuple[Metric, ...] = (Metric(name="top1", best=1.0),)
    labels: tuple[str, ...] = ()

    @abstractmethod
    def network(self) -> nn.Module:
        """A fresh, untrained network. The weights come from a checkpoint or from training."""

    @abstractmethod
    def example_inputs(self) -> Inputs:
        """Named inputs of one call, batch dimension first, with the shapes and dtypes of deployment."""

    @abstractmethod
    def train_data(self) -> Dataset[Sample]:
        """Map-style data set of ``(inputs, target)``, augmented as training wants it."""

    @abstractmethod
    def calibration_data(self) -> Dataset[Sample]:
        """Samples that set the ranges of quantization. Never samples of the evaluation data."""

    @abstractmethod
    def evaluation_data(self) -> Dataset[Sample]:
        """Samples that the metrics are measured on, on the host and on the target."""

    @abstractmethod
    def loss(self, outputs: Outputs, target: Any) -> Tensor:
        """Scalar loss of a batch; ``target`` is the collated target."""

    def qat_data(self) -> Dataset[Sample]:
        """Training data for QAT; override it to use weaker augmentation."""
        return self.train_data()

    def calibration_sets(self) -> dict[str, Dataset[Sample]]:
        """Calibration data by name, for recipes that choose among them (``qat.calibration_set``), such as by scene."""
        return {DEFAULT_CALIBRATION_SET: self.calibration_data()}

    def scene_of(self, inputs: Inputs, target: Any) -> str:
        """What a sample shows, in a word, for the coverage of calibration sets. The default serves classification."""
        try:
            label = int(target)
        except (TypeError, ValueError, RuntimeError):
            return "all"
        return self.labels[label] if 0 <= label < len(self.labels) else str(label)

    def score_sample(self, outputs: Mapping[str, np.ndarray[Any, Any]], target: Any) -> Record:
        """What one sample adds to the metrics; ``outputs`` are without batch dimension.

        The record is JSON and is kept for paired tests. The default serves classification: ``top1``
        is 1.0 when the largest value of the first output is the target's.
        """
        return {"top1": float(int(np.argmax(outputs[self.output_names[0]])) == int(target))}

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """Metric values of many samples. The default is the mean of each metric's records."""
        return {
            metric.name: float(np.mean([record[metric.name] for record in records]))
            for metric in self.metrics
        }

    def collate(self, samples: list[Sample]) -> tuple[Inputs, Any]:
        """Batches samples; override it for ragged inputs or targets."""
        inputs, target = default_collate(samples)
        return inputs, target

    def frame_processing(self) -> FrameProcessing | None:
        """How a camera's frame becomes the input and the outputs become results, for ``benchmark.stream``.

        None, the default, where the network does not work on frames.
        """
        return None

    def input_names(self) -> tuple[str, ...]:
        return tuple(self.example_inputs())

    @property
    def primary_metric(self) -> Metric:
        return self.metrics[0]


def call_network(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> Outputs:
    """Calls the network with named inputs and names what it returns. Raises WorkloadError on a mismatch."""
    with plain_kernels():
        returned = network(*inputs.values())
    values: list[Any]
    if isinstance(returned, dict):
        values = [returned.get(name) for name in output_names]
    else:
        values = [returned] if isinstance(returned, Tensor) else list(returned)
    if len(values) != len(output_names) or not all(isinstance(value, Tensor) for value in values):
        raise WorkloadError(
            f"The network returned {_describe(returned)}, but output_names is {list(output_names)}. "
            "Set output_names of the workload to one name a tensor that forward returns."
        )
    return dict(zip(output_names, values, strict=True))


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Without PyTorch's fused transformer kernels, which hide their layers from quantizers, counters and ONNX."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def check_workload(workload: Workload) -> None:
    """Runs the untrained network on the example inputs, and looks at samples of the data sets that an engine sees.

    Raises WorkloadError with what is wrong.
    """
    name = type(workload).__qualname__
    with _explained(f"{name}.example_inputs() fails"):
        inputs = workload.example_inputs()
    if not (isinstance(inputs, dict) and inputs and all(isinstance(t, Tensor) for t in inputs.values())):
        raise WorkloadError(
            f"{name}.example_inputs() returned {_describe(inputs)}. Return a dict of named tensors, such as "
            "{'image': torch.zeros(1, 3, 224, 224)}."
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
    with _explained(f"{name}.network() fails"):
        network = workload.network()
    if not isinstance(network, nn.Module):
        raise WorkloadError(f"{name}.network() returned {_describe(network)}. Return a torch.nn.Module.")
    with _explained(f"{name}: its network fails on its own example_inputs {shapes}"), torch.no_grad():
        outputs = call_network(network.eval(), inputs, workload.output_names)
        check_control_flow(network, inputs)
    _check_labels(workload, outputs)
    for source in ("calibration_data", "evaluation_data"):
        _check_ends(workload, source)


def check_training_data(workload: Workload) -> None:
    """Looks at samples that training and QAT see, as ``check_workload`` does at those that an engine sees.

    Apart, as making training data may take long. Data that are not implemented are passed over: a recipe may do
    without. Leaves PyTorch's random numbers as they were, whatever augmentation draws.
    """
    with torch.random.fork_rng(devices=()):
        for source in ("train_data", "qat_data"):
            try:
                _check_ends(workload, source)
            except WorkloadError as exc:
                if not isinstance(exc.__cause__, NotImplementedError):
                    raise


def _check_labels(workload: Workload, outputs: Outputs) -> None:
    """The labels against the classes of the output that a frame's results are made of, or of a classifier's first."""
    qualname = type(workload).__qualname__
    with _explained(f"{qualname}.frame_processing() fails"):
        frames = workload.frame_processing()
    name = frames.outputs[0] if frames else workload.output_names[0]
    shape = tuple(outputs[name].shape) if name in outputs else ()
    has_classes = len(shape) > 1 if frames else len(shape) == 2
    if workload.labels and has_classes and shape[1] != len(workload.labels):
        raise WorkloadError(
            f"{qualname}.labels has {len(workload.labels)} names, but the output {name!r} of shape {list(shape)} has "
            f"{shape[1]} classes. Give one name a class, in the order of the outputs."
        )


def _check_ends(workload: Workload, source: str) -> None:
    """The first and the last sample against the example inputs, whose shape an engine is built for; empty sets are
    seen later."""
    name = f"{type(workload).__qualname__}.{source}()"
    with _explained(f"{name} fails"):
        data = getattr(workload, source)()
        ends = range(len(data))[:: max(1, len(data) - 1)]
        samples = {index: workload.collate([data[index]])[0] for index in ends}
    for index, inputs in samples.items():
        _check_sample(f"{name}[{index}]", inputs, workload.example_inputs())


def _check_sample(name: str, inputs: Inputs, expected: Inputs) -> None:
    if set(inputs) != set(expected):
        raise WorkloadError(
            f"{name} gives the inputs {sorted(inputs)}, example_inputs() has {sorted(expected)}. "
            "Use the same names in both."
        )
    for key, tensor in inputs.items():
        given, wanted = tuple(tensor.shape[1:]), tuple(expected[key].shape[1:])
        if given != wanted or tensor.dtype != expected[key].dtype:
            raise WorkloadError(
                f"{name} gives {key!r} as {tensor.dtype} {list(given)}, example_inputs() has "
                f"{expected[key].dtype} {list(wanted)} behind the batch. An engine takes one shape and type: resize, "
                "pad or convert the samples, or correct example_inputs()."
            )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except WorkloadError:
        raise
    except Exception as exc:
        raise WorkloadError(
            f"{what}: {describe_error(exc)}. Make network()(*example_inputs().values()) work, then run again."
        ) from exc


def load_workload(config: WorkloadConfig, *, search_path: Sequence[Path] = ()) -> Workload:
    """Imports and constructs the workload of a recipe.

    ``search_path`` are folders to look in before the installed packages (the recipe's and the current one).
    Raises ConfigError when it cannot be imported or constructed.
    """
    find_workload(config, search_path=search_path)
    module_name, _, class_name = config.class_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise ConfigError(
            f"workload.class_path: {module_name!r} fails while it is imported: {describe_error(exc)}. "
            f"Make `python -c 'import {module_name}'` work, then run again."
        ) from exc
    workload_class = getattr(module, class_name, None)
    if not (inspect.isclass(workload_class) and issubclass(workload_class, Workload)):
        raise ConfigError(
            f"workload.class_path: {module_name} has no class {class_name!r} that derives from "
            "jetway.tasks.workload.Workload."
        )
    return _construct(workload_class, config.options)


def _construct(workload_class: type[Workload], options: dict[str, Any]) -> Workload:
    name, signature = workload_class.__qualname__, inspect.signature(workload_class)
    try:
        signature.bind(**options)
    except TypeError as exc:
        raise ConfigError(
            f"workload.options: {name}{signature} does not take {sorted(options)}: {exc}"
        ) from exc
    try:
        return workload_class(**options)
    except Exception as exc:
        raise ConfigError(
            f"workload.options: {name}(**{options}) fails: {describe_error(exc)}. "
            "Correct the options, or the constructor."
        ) from exc


def workload_digest(workload: Workload, config: WorkloadConfig) -> str:
    """Digest of what a stage's result depends on: the class, the project's source files it imports,
    its options and its revision."""
    return json_sha256(
        {
            "class_path": config.class_path,
            "sources": source_digests(config.class_path.partition(":")[0]),
            "options": json.loads(json.dumps(config.options, default=str)),
            "revision": config.revision,
        }
    )


def batches(
    workload: Workload, data: Dataset[Sample], batch_size: int, *, limit: int | None = None
) -> Iterator[tuple[Inputs, Any]]:
    """Batches of a data set in its own order, ``limit`` samples at most."""
    count = len(data) if limit is None else min(limit, len(data))  # type: ignore[arg-type]
    for start in range(0, count, batch_size):
        yield workload.collate([data[i] for i in range(start, min(start + batch_size, count))])


def evaluate_network(
    workload: Workload,
    network: nn.Module,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    indices: Sequence[int] | None = None,
    data: Dataset[Sample] | Sequence[Sample] | None = None,
) -> list[Record]:
    """Per-sample records of the evaluation data, or of some of it, or of other data, scored by the workload's own
    metric code."""
    network.eval()
    data = workload.evaluation_data() if data is None else data
    chosen = range(len(data)) if indices is None else indices  # type: ignore[arg-type]
    records: list[Record] = []
    with torch.no_grad():
        for start in range(0, len(chosen), batch_size):
            samples = [data[i] for i in chosen[start : start + batch_size]]
            inputs = {name: t.to(device) for name, t in workload.collate(samples)[0].items()}
            outputs = call_network(network, inputs, workload.output_names)
            arrays = {name: as_scored(t).cpu().numpy() for name, t in outputs.items()}
            records += [
                workload.score_sample({name: a[i] for name, a in arrays.items()}, samples[i][1])
                for i in range(len(samples))
            ]
    return records


def as_scored(output: Tensor) -> Tensor:
    """Half precision as float32, which NumPy can hold; every other dtype as it is, as on the target."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict with {sorted(value)}"
    return f"a {type(value).__name__}"
