"""The recipe (what to do to which network) and the target file (where), as frozen models.

The section of a stage whose result may be reused carries a ``revision``: raise it to make the stage run again
although nothing else changed. Benchmark and evaluation are never reused, so they have none.
Validators are pure: nothing here reads a file, imports a workload or opens a connection.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of every section: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class StageSection(Section):
    revision: int = Field(default=1, ge=1, description="Raise it to run the stage again.")


Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
# Text that ends in file names, MLflow tags and log lines.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class WorkloadConfig(StageSection):
    class_path: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="Import path of the workload class: my_package.my_module:MyWorkload.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the workload's constructor."
    )
    checkpoint: str | None = Field(
        default=None,
        description="Trained weights, relative to the recipe: .safetensors, or .pt holding a state dict. "
        "Without it, the train section trains the baseline.",
    )


class OptimizerName(StrEnum):
    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class ScheduleName(StrEnum):
    CONSTANT = "constant"
    COSINE = "cosine"
    ONE_CYCLE = "one_cycle"


class TrainingSection(StageSection):
    """What training, fine-tuning and QAT have in common."""

    epochs: int = Field(default=10, ge=0, le=10_000, description="Passes over the training data.")
    batch_size: int = Field(default=64, ge=1, description="Samples a step.")
    optimizer: OptimizerName = Field(default=OptimizerName.ADAMW, description="Optimizer of the loop.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay of the optimizer.")
    schedule: ScheduleName = Field(
        default=ScheduleName.COSINE, description="Learning-rate schedule, by step."
    )
    gradient_clip_norm: float | None = Field(
        default=None, gt=0, description="Largest norm of the gradient; none by default."
    )
    mixed_precision: bool = Field(
        default=True, description="bfloat16 autocast where there is a GPU; ignored on a CPU."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after this many epochs without a better primary metric."
    )


class TrainConfig(TrainingSection):
    """Trains the baseline when the workload names no checkpoint."""

    epochs: int = Field(default=20, ge=1, le=10_000, description="Passes over the training data.")


class AnalyzeConfig(StageSection):
    latency_runs: int = Field(default=20, ge=1, description="Timed forward passes for the latency shares.")


class Importance(StrEnum):
    L1 = "l1"
    L2 = "l2"
    TAYLOR = "taylor"
    BN_SCALE = "bn_scale"
    RANDOM = "random"


class PruneConfig(StageSection):
    importance: Importance = Field(default=Importance.L2, description="Score that decides which channels go.")
    scope: Literal["local", "global"] = Field(
        default="local", description="Rank channels within each layer, or over the whole network."
    )
    pruning_ratio: Ratio = Field(default=0.5, description="Share of the channels to remove, in [0, 1).")
    pruning_ratios: dict[str, Ratio] = Field(
        default_factory=dict, description="Ratios of single modules, by glob over module names."
    )
    target_macs_ratio: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Prune until MACs are at most this share of the baseline's; pruning_ratio is then found.",
    )
    ignored_layers: tuple[str, ...] = Field(
        default=(),
        description="Modules left alone, by name or glob. A pattern that matches none is an error.",
    )
    round_to: int = Field(default=8, ge=1, description="Channel counts stay multiples of this.")
    max_pruning_ratio: Ratio = Field(default=0.9, description="Most that any one layer may lose.")
    iterative_steps: int = Field(default=1, ge=1, le=100, description="Steps to reach the ratio in.")
    finetune_epochs_between: int = Field(
        default=0, ge=0, description="Epochs of fine-tuning after every step but the last."
    )
    calibration_batches: int = Field(
        default=4, ge=1, description="Batches of training data whose gradients Taylor importance averages."
    )


class DistillationConfig(Section):
    weight: float = Field(
        default=0.5, ge=0, le=1, description="Share of the loss that follows the baseline's outputs."
    )
    temperature: float = Field(default=2.0, gt=0, description="Softens both sides' logits.")


class FinetuneConfig(TrainingSection):
    distillation: DistillationConfig | None = Field(
        default=None, description="Learn from the baseline's outputs too."
    )


class CalibrationMethod(StrEnum):
    MAX = "max"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"


class QatConfig(TrainingSection):
    """PTQ calibrates; QAT trains on from there. The int8 variants share this section."""

    epochs: int = Field(default=3, ge=0, le=10_000, description="QAT epochs; a few are enough.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate; small.")
    calibration: CalibrationMethod = Field(
        default=CalibrationMethod.MAX, description="How activation ranges are chosen."
    )
    percentile: float = Field(default=99.9, gt=50, le=100, description="For calibration: percentile.")
    calibration_samples: int = Field(
        default=128, ge=1, description="Samples of the calibration data that set the ranges, at most."
    )
    keep_float: tuple[str, ...] = Field(
        default=(),
        description="Modules kept in float, by name or glob. A pattern that matches none is an error.",
    )
    distillation: DistillationConfig | None = Field(
        default=None, description="Learn from the baseline's outputs too."
    )


class ExportConfig(StageSection):
    opset: int = Field(default=17, ge=11, le=20, description="ONNX operator set; int8 needs 13 or more.")
    dynamic_batch: bool = Field(default=False, description="Leave the batch dimension open.")


class VerifyConfig(StageSection):
    atol: float = Field(
        default=1e-3, ge=0, description="Allowed error as a fraction of the output's largest magnitude."
    )
    rtol: float = Field(default=1e-3, ge=0, description="Allowed error as a fraction of each value.")
    int8_atol: float = Field(default=0.10, ge=0, description="atol for int8 variants.")
    argmax_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Least share of samples whose argmax agrees; leave out where argmax means nothing.",
    )
    samples: int = Field(default=64, ge=1, description="Evaluation samples that are compared.")


class BuildConfig(StageSection):
    threads: int = Field(default=1, ge=1, le=256, description="Threads of one inference; recorded.")
    timeout_s: float = Field(default=1800, gt=0, description="Longest build.")


class BenchmarkConfig(Section):
    """Runs every time: a measurement is never reused."""

    warmup_runs: int = Field(default=20, ge=1, description="Untimed queries of each variant.")
    min_queries: int = Field(
        default=664, ge=10, description="Timed queries of each variant, at least; 662 is the least for a p99."
    )
    min_duration_s: float = Field(default=3.0, gt=0, description="Timed seconds of each variant, at least.")
    slice_s: float = Field(
        default=0.1, gt=0, description="Seconds that one variant runs before the next has its turn."
    )
    max_drift_ratio: float = Field(
        default=0.15,
        gt=0,
        description="Largest change of a variant's median against the canary's, first third to last.",
    )
    max_extensions: int = Field(
        default=3, ge=0, description="How often a session that drifted goes on before it is called INVALID."
    )
    timeout_s: float = Field(default=1800, gt=0, description="Longest session.")


class EvaluateConfig(Section):
    """Runs every time: what the target answers is never reused."""

    samples: int | None = Field(default=None, ge=1, description="Evaluation samples; all by default.")
    timeout_s: float = Field(default=1800, gt=0, description="Longest evaluation.")


class Stage(StrEnum):
    """Which checkpoint a variant is made of."""

    BASELINE = "baseline"
    PRUNED = "pruned"


class Precision(StrEnum):
    FP32 = "fp32"
    INT8_PTQ = "int8-ptq"
    INT8_QAT = "int8-qat"


class Variant(Section):
    """A row of the stage table, written ``pruned-int8-qat``."""

    stage: Stage
    precision: Precision

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.precision}"

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in VARIANT_NAMES:
            raise ValueError(f"unknown variant {value!r}; allowed: {', '.join(VARIANT_NAMES)}")
        stage, _, precision = value.partition("-")
        return {"stage": stage, "precision": precision}


VARIANT_NAMES = tuple(f"{stage}-{precision}" for stage in Stage for precision in Precision)

_GATE = re.compile(
    r"^\s*(?:(?P<variant>[A-Za-z0-9*?_-]+)\s*:)?\s*(?P<metric>[a-z][a-z0-9_]*)\s*"
    r"(?P<op><=|>=)\s*(?P<limit>[-+0-9.eE]+)\s*$"
)


class Gate(Section):
    """A limit on a metric, written ``pruned-int8-qat: top1_drop <= 0.010``; without a variant it holds for all."""

    metric: str
    op: Literal["<=", ">="]
    limit: float = Field(allow_inf_nan=False)
    variant: str = Field(default="*", description="Glob over variant names.")

    @property
    def name(self) -> str:
        return f"{self.variant}: {self.metric} {self.op} {self.limit:g}"

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _GATE.match(value)
        if match is None:
            raise ValueError(
                f"cannot read the gate {value!r}; write it like 'pruned-int8-qat: top1_drop <= 0.01'"
            )
        return {key: text for key, text in match.groupdict().items() if text is not None}


class Recipe(Section):
    """One deployment: a workload, what is done to it, and what must hold at the end."""

    schema_version: Literal[1] = Field(default=1, description="Version of this file format.")
    name: Name = Field(description="Name of the recipe; the MLflow experiment carries it.")
    description: str = Field(default="", max_length=2000, description="A sentence for the reviewer.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of every random choice.")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Threads of the host stages; the machine's cores by default."
    )
    workload: WorkloadConfig
    train: TrainConfig | None = Field(default=None, description="How to train a missing baseline.")
    analyze: AnalyzeConfig = AnalyzeConfig()
    prune: PruneConfig = PruneConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    qat: QatConfig = QatConfig()
    export: ExportConfig = ExportConfig()
    verify: VerifyConfig = VerifyConfig()
    build: BuildConfig = BuildConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    variants: tuple[Variant, ...] = Field(
        min_length=1, description="Rows of the stage table, baseline first."
    )
    gates: tuple[Gate, ...] = Field(default=(), description="Limits that decide the exit code.")
    targets: tuple[Name, ...] = Field(
        default=("loopback",), min_length=1, description="Target files to deploy to; --target overrides it."
    )

    @field_validator("variants")
    @classmethod
    def _distinct(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [variant.name for variant in variants]
        if len(set(names)) < len(names):
            raise ValueError(f"each variant once, please: {', '.join(names)}")
        return variants

    @field_validator("variants")
    @classmethod
    def _baseline_first(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if variants[0].name != "baseline-fp32":
            raise ValueError("the first variant must be baseline-fp32: every ratio and drop refers to it")
        return variants

    @model_validator(mode="after")
    def _int8_opset(self) -> Recipe:
        int8 = any(variant.precision != Precision.FP32 for variant in self.variants)
        if int8 and self.export.opset < 13:
            raise ValueError(
                f"export.opset is {self.export.opset}, but int8 variants need 13 or more (per-channel Q/DQ)"
            )
        return self


class EngineName(StrEnum):
    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Target(Section):
    """An SSH host and a folder on it."""

    schema_version: Literal[1] = Field(default=1, description="Version of this file format.")
    name: Name = Field(description="Name of the target, as in --target.")
    kind: Literal["ssh", "loopback"] = Field(
        default="ssh",
        description="ssh: a machine of yours. loopback: this machine, through a real SSH server.",
    )
    host: str = Field(
        default="127.0.0.1", pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_%-]*$", description="Host name or address."
    )
    port: int = Field(default=22, ge=1, le=65535, description="Port of its SSH server.")
    user: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9._-]*$",
        description="User to log in as; yours by default.",
    )
    identity_file: str | None = Field(
        default=None, description="Private key; the agent's and the usual ones by default. Never a password."
    )
    known_hosts: str | None = Field(
        default=None,
        description="Host keys to trust besides ~/.ssh/known_hosts and what `jetway trust` recorded.",
    )
    python: str = Field(
        default="python3",
        min_length=1,
        description="Python 3.6 or newer on the target, with the engine importable.",
    )
    work_dir: str = Field(
        default="jetway", min_length=1, description="Folder on the target, absolute or in the user's home."
    )
    engine: EngineName = Field(
        default=EngineName.ONNXRUNTIME, description="What builds and runs the engines."
    )
    orphan_grace_s: float = Field(
        default=30, ge=5, le=3600, description="A job whose host stays silent this long ends itself."
    )
    busy_timeout_s: float = Field(
        default=600, ge=0, description="How long to wait for an accelerator that another job holds."
    )
    min_free_disk_mib: int = Field(default=512, ge=0, description="Free disk that preflight asks for.")
    min_free_memory_mib: int = Field(default=256, ge=0, description="Free memory that preflight asks for.")
