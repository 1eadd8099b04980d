"""The one training loop: of the baseline, of fine-tuning, and of quantization-aware training.

Every epoch draws its order, its augmentation and its dropout from a seed of its own: the same seed gives the
same network on the same machine and thread count, and a resumed run goes on as an uninterrupted one would.
Epochs are compared on the evaluation data, the only ones that every workload has labels for.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from jetway.configs.schema import (
    DistillationConfig,
    FinetuneConfig,
    OptimizerName,
    QatConfig,
    ScheduleName,
    SlimmingConfig,
    TrainConfig,
    TrainingSection,
)
from jetway.tasks.artifacts import json_sha256
from jetway.tasks.errors import ConfigError, JetwayError, TrainingError, WorkloadError
from jetway.tasks.features import Features, feature_loss, feature_names
from jetway.tasks.metrics import Metric
from jetway.tasks.ranks import Ranks, current_ranks, in_group
from jetway.tasks.stage import StageContext, seed_everything, stage_seed
from jetway.tasks.structure import Structure
from jetway.tasks.torchrun import Training, train_with_torchrun
from jetway.tasks.weight_average import WeightAverage
from jetway.tasks.workload import Inputs, Outputs, Sample, Workload, call_network, evaluate_network

logger = logging.getLogger("jetway")

# The one-cycle schedule of PyTorch: warm-up share, and how far below the peak it starts and ends.
_WARMUP_SHARE = 0.3
_START_DIVISOR = 25.0
_END_DIVISOR = 2.5e5

_SGD_MOMENTUM = 0.9

# Parameters that a warning names.
_LISTED = 6


@dataclass(frozen=True)
class Epoch:
    """One line of the history. Epoch 0 is the network as it came, and has no loss."""

    epoch: int
    loss: float | None
    metrics: dict[str, float]
    learning_rate: float
    seconds: float
    #: Of all processes together, while they trained: evaluation and saving are not counted.
    samples_per_s: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What training gave; the network itself holds the weights of ``best_epoch``."""

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped_early: bool

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the best epoch on the evaluation data."""
        return self.history[self.best_epoch].metrics

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    network: nn.Module,
    workload: Workload,
    section: TrainingSection,
    *,
    context: StageContext,
    data: Dataset[Sample],
    teacher: nn.Module | None = None,
    stage: str = "train",
    structure: Structure | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Trains ``network`` in place and leaves it in eval mode, on the CPU, with its best weights.

    Best is by the workload's primary metric on its evaluation data, after each epoch and before the first,
    so training never hands on less than it was given; slimming hands on its last epoch, the sparsest. With
    ``distillation`` in the section, ``teacher``'s outputs are followed too. State is kept under
    ``context.work_dir`` after every epoch, and the same call after a kill goes on from there.

    With ``section.processes`` above 1, or processes that load, the work is done under torchrun: what loads is
    forked, and a process with Prefect's threads must not be. A quantized network's ``structure`` comes from the
    caller, as it cannot be read off such a network.

    Raises TrainingError when the loss is not finite, WorkloadError when what the user brought raises.
    """
    if (section.processes > 1 or section.loader_workers) and not in_group():
        training = Training(network, workload, section, context, teacher, stage, structure)
        return _as_result(train_with_torchrun(training, lambda line: on_epoch and on_epoch(Epoch(**line))))
    trainer = _Trainer(network, workload, section, context, data, teacher, stage)
    trainer.resume()
    while trainer.goes_on():
        epoch = trainer.run_epoch()
        if on_epoch:
            on_epoch(epoch)
    return trainer.finish()


def learning_rate_at(section: TrainingSection, step: int, total_steps: int) -> float:
    """Learning rate of a step, counted from 0.

    Cosine: Loshchilov & Hutter 2017, without restarts. One cycle: Smith & Topin 2018, in PyTorch's shape.
    """
    peak = section.learning_rate
    if section.schedule is ScheduleName.CONSTANT:
        return peak
    if section.schedule is ScheduleName.COSINE:
        return _anneal(peak, 0.0, step / total_steps)
    warmup = max(1, round(_WARMUP_SHARE * total_steps))
    if step < warmup:
        return _anneal(peak / _START_DIVISOR, peak, step / warmup)
    return _anneal(peak, peak / _END_DIVISOR, (step - warmup) / max(1, total_steps - warmup))


def distillation_loss(outputs: Outputs, teacher_outputs: Outputs, temperature: float) -> Tensor:
    """Distance of a network's outputs from its teacher's, the mean over the floating-point outputs.

    The first output, when it is a batch of vectors (two dimensions, two values or more), is taken as class
    logits: Kullback-Leibler divergence of the softened distributions times the temperature squared
    (Hinton, Vinyals & Dean 2015). Every other output counts by its mean squared error.
    """
    first = next(iter(outputs))
    losses = [
        _softened_divergence(output, teacher_outputs[name], temperature)
        if name == first and output.dim() == 2 and output.shape[1] > 1
        else F.mse_loss(output, teacher_outputs[name])
        for name, output in outputs.items()
        if output.is_floating_point()
    ]
    return torch.stack(losses).mean()


def evaluate(workload: Workload, network: nn.Module, *, device: str = "cpu") -> dict[str, float]:
    """The workload's metrics on its evaluation data. Raises WorkloadError when its metric code fails."""
    network.to(device)
    ranks = current_ranks()
    with users_code(workload, "evaluation"):
        indices = ranks.share(range(len(workload.evaluation_data())))  # type: ignore[arg-type]
        records = evaluate_network(workload, network, device=device, indices=indices)
        metrics = workload.summarize(ranks.gather(records))
    missing = [metric.name for metric in workload.metrics if metric.name not in metrics]
    if missing:
        raise WorkloadError(
            f"{type(workload).__qualname__}.summarize returned {sorted(metrics)}, without {missing}. "
            "Return every metric that the workload lists, or list fewer."
        )
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    if undefined:
        raise WorkloadError(
            f"{type(workload).__qualname__}: {undefined} of the evaluation data are not finite. "
            "Check the network's outputs for NaN, and the metric for samples it is not defined on."
        )
    return {name: float(value) for name, value in metrics.items()}


def batchnorm_scales(network: nn.Module) -> Tensor:
    """All scales of the network's BatchNorm layers, in one row. Raises ConfigError when there are none."""
    scales: list[Tensor] = [norm.weight for norm in _batchnorms(network) if norm.affine]
    if not scales:
        raise ConfigError(
            "prune.slimming: the network has no BatchNorm with scales to make sparse. Leave prune.slimming out."
        )
    return torch.cat(scales)


def is_better(metric: Metric, value: float, than: float) -> bool:
    return value > than if metric.higher_is_better else value < than


@contextmanager
def users_code(workload: Workload, doing: str) -> Iterator[None]:
    """Turns whatever the user's code raises into a WorkloadError that says where."""
    try:
        yield
    except JetwayError:
        raise
    except Exception as exc:
        raise WorkloadError(
            f"{type(workload).__qualname__}: {doing} failed: {type(exc).__name__}: {exc}. "
            "Check the workload's network, data, collate, loss and metrics on one batch."
        ) from exc


def to_device(batch: tuple[Inputs, Any], device: str) -> tuple[Inputs, Any]:
    """A batch there; targets may be nested tuples, lists and dicts of tensors."""
    inputs, target = batch
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    return moved, _moved(target, device)


class _Trainer:
    """State of one training run. Everything that a resumed run needs is in ``_state``."""

    def __init__(
        self,
        network: nn.Module,
        workload: Workload,
        section: TrainingSection,
        context: StageContext,
        data: Dataset[Sample],
        teacher: nn.Module | None,
        stage: str,
    ) -> None:
        self.network, self.workload, self.section = network, workload, section
        self.context, self.data, self.stage = context, data, stage
        self.distillation = _distillation(section, teacher)
        self.teacher = teacher.to(context.device).eval() if teacher and self.distillation else None
        self.state_path = context.work_dir / f"training-{self._fingerprint()}.pt"
        self.ranks = current_ranks()
        self.count = len(data)  # type: ignore[arg-type]
        self.steps = _steps_an_epoch(workload, self.count, section.batch_size, self.ranks.count)
        self.joined = self.ranks.joined(network.to(context.device))
        self.shares: list[list[tuple[int, int]]] = []
        self.loader = self._loader()
        self.optimizer = _optimizer(network, section)
        self.average = WeightAverage(network, section.ema_decay) if section.ema_decay else None
        self.features = self._watch_features()
        self.history: list[Epoch] = []
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}

    def resume(self) -> None:
        """Takes up the state of a killed run of the same training, or evaluates the network as it came."""
        state = _read_state(self.state_path)
        if state is None:
            epoch = Epoch(0, None, self._evaluate(), 0.0, 0.0)
            self._keep_if_best(epoch)
            self._finish_epoch(epoch)
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.restore(state["average"])
        self.history = [Epoch(**line) for line in state["history"]]
        self.best_epoch, self.best_weights = state["best_epoch"], state["best_weights"]
        logger.info("%s: resumed after epoch %d", self.stage, self.epoch)

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return len(self.history) - 1

    def goes_on(self) -> bool:
        return self.epoch < self.section.epochs and not self._out_of_patience()

    def run_epoch(self) -> Epoch:
        started = time.monotonic()
        number = self.epoch + 1
        seed_everything(stage_seed(self.context.seed, f"{self.stage}:{number}"))
        self.joined.train()
        if isinstance(self.section, QatConfig) and self.section.freeze_batchnorm:
            for norm in _batchnorms(self.network):
                norm.eval()
        with users_code(self.workload, f"epoch {number}"):
            losses = [self._checked(number, step, loss) for step, loss in enumerate(self._losses(number))]
        trained_s = time.monotonic() - started
        rate = self.optimizer.param_groups[0]["lr"]
        self.ranks.share_buffers(self.network)
        losses = self.ranks.gather(losses)
        loss = math.fsum(losses) / len(losses)
        with self._averaged():
            metrics = self._evaluate()
            seconds, samples = time.monotonic() - started, min(self.count, self.steps * self._batch_size)
            epoch = Epoch(number, loss, metrics, rate, seconds, samples / trained_s)
            self._keep_if_best(epoch)
        self._finish_epoch(epoch)
        self._show(number, self.steps, f"loss {loss:.4f}, {self._best_text()}")
        return epoch

    def finish(self) -> TrainResult:
        self.network.load_state_dict(self.best_weights)
        self.network.to("cpu").eval()
        if self.teacher is not None:
            self.teacher.to("cpu")
        for watched in self.features or ():
            watched.close()
        return TrainResult(tuple(self.history), self.best_epoch, self.epoch < self.section.epochs)

    def _batches(self, epoch: int) -> Iterator[tuple[Inputs, Any]]:
        """This process's share of each batch. All draw the same order, and then augment by seeds of their own."""
        order, size = torch.randperm(self.count).tolist(), self._batch_size
        shares = [self.ranks.share(order[at : at + size]) for at in range(0, self.steps * size, size)]
        seed = stage_seed(self.context.seed, f"{self.stage}:{epoch}:{self.ranks.rank}")
        if not self.ranks.is_first:
            seed_everything(seed)
        self.shares[:] = [[(index, seed + index) for index in share] for share in shares]
        yield from self.loader

    @property
    def _batch_size(self) -> int:
        """Samples a step of all processes together."""
        return self.section.batch_size * self.ranks.count

    def _loader(self) -> DataLoader[Any]:
        """Reads ``shares``, which each epoch fills. Its processes, if any, stay from epoch to epoch."""
        workers = self.section.loader_workers
        return DataLoader(
            _Seeded(self.data) if workers else _Plain(self.data),
            batch_sampler=self.shares,
            collate_fn=self.workload.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
            pin_memory=self.context.device == "cuda",
        )

    def _losses(self, epoch: int) -> Iterator[Tensor]:
        """Of each step. On a GPU one step late, so that it has work while the host reads the last loss."""
        losses = (self._step(epoch, step, batch) for step, batch in enumerate(self._batches(epoch)))
        return _one_behind(losses) if self.context.device == "cuda" else losses

    def _step(self, epoch: int, step: int, batch: tuple[Inputs, Any]) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(epoch, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*to_device(batch, self.context.device))
        loss.backward()  # type: ignore[no-untyped-call]
        if epoch == 1 and step == 0 and self.ranks.is_first:
            self._warn_of_unused()
        if self.section.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.section.gradient_clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update()
        return loss.detach()

    def _warn_of_unused(self) -> None:
        parameters = self.network.named_parameters()
        unused = [name for name, value in parameters if value.requires_grad and value.grad is None]
        if unused:
            more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
            logger.warning(
                "%s: never used by the loss: %s%s; nothing trains them, and they are kept as they are. Leave them out "
                "of network(), or use them in loss().",
                self.stage,
                ", ".join(unused[:_LISTED]),
                more,
            )

    def _checked(self, epoch: int, step: int, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise TrainingError(self._not_finite(value, epoch, step, self._learning_rate(epoch, step)))
        self._show(epoch, step + 1, f"loss {value:.4f}")
        return value

    def _learning_rate(self, epoch: int, step: int) -> float:
        done = (epoch - 1) * self.steps + step
        rate = learning_rate_at(self.section, done, self.section.epochs * self.steps)
        return rate * _rate_scale(self.section.optimizer, self.ranks)

    def _loss(self, inputs: Inputs, target: Any) -> Tensor:
        outputs = self._call(self.joined, inputs)
        loss = self.workload.loss(outputs, target)
        if isinstance(self.section, SlimmingConfig):
            return loss + self.section.strength * batchnorm_scales(self.network).abs().sum()
        if self.teacher is None or self.distillation is None:
            return loss
        with torch.no_grad():
            taught = self._call(self.teacher, inputs)
        share, followed = (
            self.distillation.weight,
            distillation_loss(outputs, taught, self.distillation.temperature),
        )
        if self.features:
            student, teacher = self.features
            followed = followed + self.distillation.feature_weight * feature_loss(student.seen, teacher.seen)
        return (1 - share) * loss + share * followed

    def _watch_features(self) -> tuple[Features, Features] | None:
        """What student and teacher return inside, when distillation asks for it."""
        if self.teacher is None or self.distillation is None or not self.distillation.features:
            return None
        names = feature_names(self.distillation.features, self.teacher, self.network)
        return Features(self.network, names), Features(self.teacher, names)

    def _call(self, network: nn.Module, inputs: Inputs) -> Outputs:
        mixed = self.section.mixed_precision and self.context.device == "cuda"
        with torch.autocast(self.context.device, dtype=torch.bfloat16, enabled=mixed):
            outputs = call_network(network, inputs, self.workload.output_names)
        return {name: t.float() if t.is_floating_point() else t for name, t in outputs.items()}

    def _evaluate(self) -> dict[str, float]:
        return evaluate(self.workload, self.network, device=self.context.device)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    def _keep_if_best(self, epoch: Epoch) -> None:
        if epoch.epoch == 0 or self._is_as_good(epoch):
            self.best_epoch = epoch.epoch
            self.best_weights = {name: t.detach().clone() for name, t in self.network.state_dict().items()}

    def _finish_epoch(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if self.ranks.is_first:
            _write_state(self.state_path, self._state())
        self.ranks.wait()

    def _is_as_good(self, epoch: Epoch) -> bool:
        """Of equal epochs the later one counts: its loss is lower, and what was trained shows."""
        if isinstance(self.section, SlimmingConfig):
            return True
        metric = self.workload.primary_metric
        best = self.history[self.best_epoch].metrics[metric.name]
        return not is_better(metric, best, epoch.metrics[metric.name])

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
            "average": self.average.state() if self.average else None,
        }

    def _out_of_patience(self) -> bool:
        patience = self.section.patience
        return patience is not None and self.epoch - self._last_gain() >= patience

    def _last_gain(self) -> int:
        """The first epoch that was as good as the best one."""
        name = self.workload.primary_metric.name
        best = self.history[self.best_epoch].metrics[name]
        return next(epoch.epoch for epoch in self.history if epoch.metrics[name] == best)

    def _show(self, epoch: int, step: int, text: str) -> None:
        done, total = (epoch - 1) * self.steps + step, self.section.epochs * self.steps
        self.context.progress(self.stage, done, total, f"epoch {epoch}/{self.section.epochs} {text}")

    def _best_text(self) -> str:
        name = self.workload.primary_metric.name
        return f"{name} {self.history[-1].metrics[name]:.4f}"

    def _not_finite(self, value: float, epoch: int, step: int, rate: float) -> str:
        key, lower = _section_key(self.section), self.section.learning_rate / 10
        return (
            f"{self.stage}: the loss became {value} in epoch {epoch}, step {step + 1} of {self.steps}, "
            f"at learning rate {rate:.3g}. Lower {key}.learning_rate (try {lower:.1g}), or set "
            f"{key}.gradient_clip_norm: 1.0. In the first step already: look for NaN in the data."
        )

    def _fingerprint(self) -> str:
        """Names the state file, so that only the very same training takes it up."""
        return json_sha256(
            {
                "network": _weights_sha256(self.network),
                "teacher": _weights_sha256(self.teacher) if self.teacher else None,
                "section": self.section.model_dump(mode="json", exclude={"loader_workers"}),
                "workload": self.context.workload_digest,
                "seed": self.context.seed,
                "stage": self.stage,
            }
        )[:32]


def _one_behind(losses: Iterator[Tensor]) -> Iterator[Tensor]:
    last = next(losses)
    for loss in losses:
        yield last
        last = loss
    yield last


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _softened_divergence(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    student = F.log_softmax(output / temperature, dim=1)
    teacher = F.log_softmax(taught / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _distillation(section: TrainingSection, teacher: nn.Module | None) -> DistillationConfig | None:
    wanted = section.distillation if isinstance(section, (FinetuneConfig, QatConfig)) else None
    if wanted is not None and teacher is None:
        raise ConfigError(
            f"{_section_key(section)}.distillation is set, but there is no teacher to learn from. "
            "Hand the baseline's checkpoint to the stage, or leave distillation out."
        )
    return wanted


def _batchnorms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _section_key(section: TrainingSection) -> str:
    keys = {
        TrainConfig: "train",
        FinetuneConfig: "finetune",
        QatConfig: "qat",
        SlimmingConfig: "prune.slimming",
    }
    return next((key for kind, key in keys.items() if isinstance(section, kind)), "train")


def _steps_an_epoch(workload: Workload, count: int, batch_size: int, processes: int) -> int:
    """Batches of an epoch. A last one that leaves a process a single sample is left out: BatchNorm cannot
    train on it."""
    if count < processes:
        has = f"only {count} samples for {processes} processes" if count else "empty"
        raise WorkloadError(
            f"{type(workload).__qualname__}: its training data are {has}. Return some samples."
        )
    steps, rest = divmod(count, batch_size * processes)
    return max(1, steps + (rest >= 2 * processes))


def _rate_scale(optimizer: OptimizerName, ranks: Ranks) -> float:
    """By what the learning rate grows with the batch: linearly for SGD (Goyal et al. 2017), by the root for
    adaptive optimizers (Malladi et al. 2022)."""
    return ranks.count if optimizer is OptimizerName.SGD else math.sqrt(ranks.count)


class _Plain(Dataset[Sample]):
    """The data by pairs of index and seed; what is drawn comes from the process's own generators."""

    def __init__(self, data: Dataset[Sample]) -> None:
        self.data = data

    def __getitem__(self, drawn: tuple[int, int]) -> Sample:
        return self.data[drawn[0]]


class _Seeded(_Plain):
    """The same in processes that load: each sample has a seed of its own, whichever process loads it."""

    def __getitem__(self, drawn: tuple[int, int]) -> Sample:
        seed_everything(drawn[1] % 2**32)
        return super().__getitem__(drawn)


def _as_result(document: dict[str, Any]) -> TrainResult:
    history = tuple(Epoch(**line) for line in document["history"])
    return TrainResult(history, document["best_epoch"], document["stopped_early"])


def _optimizer(network: nn.Module, section: TrainingSection) -> Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate, decay = section.learning_rate, section.weight_decay
    if section.optimizer is OptimizerName.SGD:
        return SGD(parameters, lr=rate, weight_decay=decay, momentum=_SGD_MOMENTUM, nesterov=True)
    kind = Adam if section.optimizer is OptimizerName.ADAM else AdamW
    return kind(parameters, lr=rate, weight_decay=decay)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as exc:
        logger.warning("%s is unreadable (%s); training starts anew", path, exc)
        return None
    return state
