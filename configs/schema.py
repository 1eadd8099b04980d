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
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
# Text that ends in file names, MLflow tags and log lines.
Name = Annotated[str, Field(pattern=f"^{_NAME}$", max_length=64)]
# What --target takes, but paths: a name, "all", or labels that a target must have, as in class=orin,site=lab.
TargetChoice = Annotated[
    str, Field(pattern=f"^({_NAME}|{_NAME}={_NAME}(,{_NAME}={_NAME})*)$", max_length=256)
]
POWER_MODE = r"^[A-Za-z0-9][A-Za-z0-9_.+ -]{0,63}$"


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
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Evaluate and keep a moving average of the weights over steps, such as 0.999; none by default.",
    )
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that train side by side through torchrun, one a GPU. Each takes batch_size samples "
        "a step; the learning rate grows with their number for sgd, with its square root otherwise.",
    )
    loader_workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Processes that load each training process's data; 0 loads in itself.",
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
    HESSIAN = "hessian"
    BN_SCALE = "bn_scale"
    RANDOM = "random"


class DepthConfig(Section):
    """Blocks that go as a whole: modules that return a tensor of the shape that they are given."""

    keep: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="How many blocks stay, by glob over the modules that hold them: 'encoder.blocks': 4.",
    )
    ratios: dict[str, Ratio] = Field(
        default_factory=dict, description="Share of the blocks that go, by glob, instead of a count."
    )
    importance: Literal["loss", "influence"] = Field(
        default="loss",
        description="loss: how far the loss rises when the block is passed by. influence: 1 less the cosine of "
        "what it is given and what it returns.",
    )
    samples: int = Field(default=128, ge=1, description="Samples of the training data it is measured on.")

    @model_validator(mode="after")
    def _something(self) -> DepthConfig:
        if not self.keep and not self.ratios:
            raise ValueError("name the modules whose blocks go in keep or in ratios")
        return self


class SlimmingConfig(TrainingSection):
    """Training that drives BatchNorm scales to zero before channels are ranked: network slimming."""

    epochs: int = Field(default=5, ge=1, le=10_000, description="Passes over the training data.")
    strength: float = Field(
        default=1e-4, gt=0, description="Weight of the sum of the scales' magnitudes in the loss."
    )


class PruneConfig(StageSection):
    importance: Importance = Field(default=Importance.L2, description="Score that decides which channels go.")
    scope: Literal["local", "global"] = Field(
        default="local", description="Rank channels within each layer, or over the whole network."
    )
    pruning_ratio: Ratio | Literal["auto"] = Field(
        default=0.5,
        description="Share of the channels to remove, in [0, 1). auto: a share for each group of layers, from the "
        "sensitivity of the baseline, that reaches target_macs_ratio at the least rise of the loss.",
    )
    pruning_ratios: dict[str, Ratio] = Field(
        default_factory=dict, description="Ratios of single modules, by glob over module names."
    )
    head_ratio: Ratio = Field(
        default=0.0,
        description="Share of the heads that every attention loses as a whole, to the nearest head.",
    )
    head_ratios: dict[str, Ratio] = Field(
        default_factory=dict,
        description="head_ratio of single attention modules, by glob over module names: '*.attn': 0.25 makes 6 "
        "of 8 heads.",
    )
    head_dim_ratio: Ratio | None = Field(
        default=None,
        description="Share of the channels that every head loses; pruning_ratio by default. The embedding's width "
        "follows pruning_ratio, or pruning_ratios of the layer that makes it.",
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
        default=4,
        ge=1,
        description="Batches of 64 training samples whose gradients taylor and hessian take; hessian costs a "
        "backward pass a sample.",
    )
    slimming: SlimmingConfig | None = Field(
        default=None,
        description="Train towards sparse BatchNorm scales first, best with importance: bn_scale; its last epoch "
        "is what is pruned.",
    )
    depth: DepthConfig | None = Field(
        default=None, description="Blocks that are left out, before channels are pruned."
    )

    @model_validator(mode="after")
    def _automatic_target(self) -> PruneConfig:
        if self.pruning_ratio == "auto" and self.target_macs_ratio is None:
            raise ValueError("pruning_ratio: auto distributes what target_macs_ratio asks for: set that too")
        return self


class DistillationConfig(Section):
    weight: float = Field(
        default=0.5, ge=0, le=1, description="Share of the loss that follows the baseline's outputs."
    )
    temperature: float = Field(default=2.0, gt=0, description="Softens both sides' logits.")
    features: tuple[str, ...] = Field(
        default=(),
        description="Modules whose outputs follow the baseline's too, by glob; channels may be fewer.",
    )
    feature_weight: float = Field(
        default=1.0, ge=0, description="Weight of the features' distance beside that of the outputs."
    )


class FinetuneConfig(TrainingSection):
    distillation: DistillationConfig | None = Field(
        default=None, description="Learn from the baseline's outputs too."
    )


class CalibrationMethod(StrEnum):
    MAX = "max"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"
    MSE = "mse"
    #: Largest values, after difficulty moved from inputs into weights; for linear layers behind a LayerNorm.
    SMOOTHQUANT = "smoothquant"


#: The set that ``calibration_data`` of a workload returns.
DEFAULT_CALIBRATION_SET = "default"


class QatConfig(TrainingSection):
    """PTQ calibrates; QAT trains on from there. The int8 variants share this section."""

    epochs: int = Field(default=3, ge=0, le=10_000, description="QAT epochs; a few are enough.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate; small.")
    calibration: CalibrationMethod = Field(
        default=CalibrationMethod.MAX,
        description="How activation ranges are chosen. smoothquant is for networks whose linear layers stand behind "
        "a LayerNorm. Variants like baseline-int8-ptq-entropy compare methods in one run.",
    )
    percentile: float = Field(default=99.9, gt=50, le=100, description="For calibration: percentile.")
    calibration_samples: int = Field(
        default=128, ge=1, description="Samples of the calibration data that set the ranges, at most."
    )
    calibration_set: Name = Field(
        default=DEFAULT_CALIBRATION_SET,
        description="Which of the workload's calibration_sets, such as one a scene; its calibration_data by default.",
    )
    keep_float: tuple[str, ...] | Literal["auto"] = Field(
        default=(),
        description="Modules kept in float, by name or glob. A pattern that matches none is an error. auto: the "
        "fewest layers without which int8 loses at most max_metric_drop.",
    )
    max_metric_drop: float = Field(
        default=0.01,
        ge=0,
        description="For keep_float: auto: what int8 may lose of the primary metric on calibration data, before QAT.",
    )
    distillation: DistillationConfig | None = Field(
        default=None, description="Learn from the baseline's outputs too."
    )
    freeze_batchnorm: bool = Field(
        default=False,
        description="Keep the statistics of BatchNorm as the float network had them, instead of following QAT's "
        "batches; its scale and shift are trained all the same.",
    )

    @property
    def float_patterns(self) -> tuple[str, ...]:
        """The patterns of keep_float that the recipe itself gives."""
        return () if self.keep_float == "auto" else self.keep_float


class SensitivityConfig(StageSection):
    """Each part of the network pruned or quantized alone, scored on calibration data, which must have targets."""

    samples: int = Field(default=256, ge=1, description="Samples of the calibration data, at most.")
    pruning_ratios: tuple[Ratio, ...] = Field(
        default=(0.25, 0.5, 0.75),
        min_length=1,
        description="Ratios that every group of channels is tried at.",
    )


class ExportConfig(StageSection):
    opset: int = Field(default=17, ge=11, le=20, description="ONNX operator set; int8 needs 13 or more.")
    dynamic_batch: bool = Field(default=False, description="Leave the batch dimension open.")


class VerifyConfig(StageSection):
    atol: float = Field(
        default=1e-3, ge=0, description="Allowed error as a fraction of the output's largest magnitude."
    )
    rtol: float = Field(default=1e-3, ge=0, description="Allowed error as a fraction of each value.")
    fp16_atol: float = Field(default=0.01, ge=0, description="atol for fp16 variants.")
    bf16_atol: float = Field(default=0.05, ge=0, description="atol for bf16 variants.")
    int8_atol: float = Field(default=0.20, ge=0, description="atol for int8 variants.")
    int8_outliers: float = Field(
        default=1e-3,
        ge=0,
        lt=1,
        description="Share of an output's values that may be further off in int8 variants, one value at least unless "
        "it is 0: where a sum lies between two steps, PyTorch and an engine may round it apart, and what is computed "
        "of it differs by that step.",
    )
    argmax_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Least share of samples whose argmax agrees; leave out where argmax means nothing.",
    )
    samples: int = Field(default=64, ge=1, description="Evaluation samples that are compared.")


class BuildConfig(StageSection):
    threads: int = Field(default=1, ge=1, le=256, description="Threads of one inference; recorded.")
    timeout_s: float = Field(default=1800, gt=0, description="Longest build.")


FloatType = Literal["fp32", "fp16", "bf16"]
Shape = tuple[Annotated[int, Field(ge=1)], ...]


class ShapeRange(Section):
    """Shapes of one input that an optimization profile covers; ``opt`` is the one it is tuned for."""

    min: Shape = Field(description="Smallest shape, batch first.")
    opt: Shape = Field(description="The shape that kernels are chosen for.")
    max: Shape = Field(description="Largest shape; it decides how much memory the engine takes.")

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        shapes = (self.min, self.opt, self.max)
        ordered = len({len(shape) for shape in shapes}) == 1 and all(
            low <= best <= high for low, best, high in zip(*shapes, strict=True)
        )
        if not ordered:
            raise ValueError("min, opt and max must have as many dimensions, and min <= opt <= max in each")
        return self


class DlaConfig(Section):
    """The deep-learning accelerator of Xavier and Orin."""

    core: int = Field(default=0, ge=0, le=3, description="Which DLA core.")
    gpu_fallback: bool = Field(
        default=True,
        description="Layers that the DLA cannot run go to the GPU; without it they are an error.",
    )
    layers: dict[str, Literal["DLA", "GPU"]] = Field(
        default_factory=dict, description="Where single layers go, by glob over layer names."
    )


class TensorRtCalibration(Section):
    """How TensorRT's own calibrator chooses ranges, for int8-calibrated variants."""

    algorithm: Literal["entropy", "minmax"] = Field(
        default="entropy", description="entropy suits convolutional networks, minmax transformers."
    )
    samples: int = Field(default=128, ge=1, description="Samples of the calibration data, at most.")
    calibration_set: Name = Field(
        default=DEFAULT_CALIBRATION_SET, description="Which of the workload's calibration_sets."
    )


class TensorRtConfig(Section):
    """What TensorRT is asked for, on every version that has it."""

    tf32: bool = Field(
        default=False,
        description="Let fp32 layers use TF32 tensor cores, which keep 10 bits of the mantissa.",
    )
    mixed: dict[str, FloatType] = Field(
        default_factory=dict,
        description="Layers kept in a higher precision than the variant's, by glob over ONNX node names; the last "
        "glob that matches decides.",
    )
    int8_rest: Literal["fp32", "fp16"] = Field(
        default="fp32",
        description="Precision of what is not int8 in an int8 variant. fp16 is faster; from TensorRT 10 on it "
        "needs export.opset 19 or more.",
    )
    quantize_residuals: bool = Field(
        default=True,
        description="Let residual adds of int8 variants read the skip's int8 values where there are any.",
    )
    profiles: tuple[dict[str, ShapeRange], ...] = Field(
        default=(),
        description="Optimization profiles: for each, the shapes of every input with an open dimension.",
    )
    workspace_mib: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(4096, 1024, 256),
        min_length=1,
        description="Memory for the builder's choice of kernels: the next is tried when memory runs out.",
    )
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = Field(
        default=None,
        description="Effort of the builder, 0 to 5; TensorRT's own default otherwise. From 8.6 on.",
    )
    timing_cache: bool = Field(
        default=True, description="Keep kernel timings on the target, so that later builds take less time."
    )
    tactic_sources: tuple[str, ...] | None = Field(
        default=None,
        description="Libraries whose kernels are tried, such as CUBLAS_LT; TensorRT's own choice otherwise.",
    )
    max_aux_streams: int | None = Field(
        default=None,
        ge=0,
        description="Streams for layers side by side; 0 makes layer times add up. From 8.6 on.",
    )
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = Field(
        default=None, description="Let the engine run on other GPUs than the target's. From 8.6 on."
    )
    version_compatible: bool = Field(
        default=False, description="Let newer TensorRT versions load the engine. From 8.6 on."
    )
    detailed_layers: bool = Field(
        default=True, description="Keep what the layer table and the int8 report show, inside the engine."
    )
    dla: DlaConfig | None = Field(
        default=None, description="Build fp16 and int8 variants for the DLA; the GPU alone by default."
    )
    calibration: TensorRtCalibration = TensorRtCalibration()
    cuda_graph: bool = Field(
        default=False, description="Launch the engine as one CUDA graph, which suits small networks."
    )
    zero_copy: bool = Field(
        default=False, description="Share buffers with an integrated GPU instead of copying them."
    )
    streams: int = Field(default=1, ge=1, le=16, description="CUDA streams that share the engine.")

    @field_validator("workspace_mib")
    @classmethod
    def _descending(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if list(rungs) != sorted(set(rungs), reverse=True):
            raise ValueError("each rung must be smaller than the one before")
        return rungs


class ThroughputConfig(Section):
    """The throughput scenario, by trtexec's method: queries in flight, timed by CUDA events."""

    streams: int = Field(default=1, ge=1, le=16, description="Streams that each run queries of their own.")
    in_flight: int = Field(
        default=2, ge=1, le=16, description="Queries of one stream that wait or run at once."
    )
    cuda_graph: bool = Field(default=False, description="Launch queries as CUDA graphs.")
    transfers: bool = Field(default=True, description="Copy inputs and outputs of every query.")
    spin_wait: bool = Field(default=False, description="Wait for the GPU in a busy loop; takes a core.")
    warmup_ms: float = Field(default=200, ge=0, description="Milliseconds that are not counted.")
    min_duration_s: float = Field(default=3.0, gt=0, description="Timed seconds of each variant, at least.")


class PowerConfig(Section):
    """The power pass: apart from the timed queries, as reading the sensors takes time."""

    duration_s: float = Field(
        default=10, gt=0, description="Seconds of back-to-back queries of each variant."
    )
    idle_s: float = Field(default=5, gt=0, description="Seconds of rest before, whose power is subtracted.")
    interval_ms: float = Field(default=100, ge=10, description="Time between two samples.")


class StreamConfig(Section):
    """Frames from their capture to their results, timed by step; the workload's ``frame_processing`` says how."""

    source: str | None = Field(
        default=None,
        description="A video, an image or a folder of images, relative to the recipe; the evaluation data by default.",
    )
    frames: int = Field(default=672, ge=24, description="Frames of each variant; 662 is the least for a p99.")
    frame_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="Width and height that frames of the evaluation data are scaled to, such as a camera's; the "
        "network's own by default.",
    )
    clip_frames: int = Field(
        default=48, ge=1, description="Samples of the evaluation data that are sent again and again."
    )
    warmup_frames: int = Field(default=10, ge=1, description="Untimed frames of each variant.")
    queue_frames: int = Field(
        default=2, ge=1, le=64, description="Frames that may wait between two steps of the pipeline."
    )
    timeout_s: float = Field(default=600, gt=0, description="Longest session.")

    @model_validator(mode="after")
    def _one_size(self) -> StreamConfig:
        if self.source is not None and self.frame_size is not None:
            raise ValueError("frame_size is for frames of the evaluation data; those of a source keep theirs")
        return self


class BenchmarkConfig(Section):
    """Runs every time: a measurement is never reused."""

    scenarios: tuple[Literal["latency", "throughput"], ...] = Field(
        default=("latency",),
        description="latency: one query at a time. throughput: queries in flight, on TensorRT engines alone.",
    )
    throughput: ThroughputConfig = ThroughputConfig()
    telemetry: bool = Field(
        default=True, description="Sample temperatures, clocks and memory while the session runs."
    )
    power: PowerConfig | None = Field(
        default=None, description="Measure watts and energy an inference, in a pass of its own."
    )
    stream: StreamConfig | None = Field(
        default=None, description="Time frames from capture to results too, in a session of their own."
    )
    power_mode: str | None = Field(
        default=None,
        pattern=POWER_MODE,
        description="Power mode by name, such as MAXN; the target's otherwise.",
    )
    lock_clocks: bool | None = Field(
        default=None,
        description="Hold clocks at their maximum (jetson_clocks); as the target says otherwise.",
    )
    keep_loaded: bool | Literal["auto"] = Field(
        default="auto",
        description="Hold all engines in memory together (true), or load each for its slices, which is not timed "
        "(false); auto decides by the memory that there is.",
    )
    profile_layers: bool = Field(
        default=False, description="Time each layer of TensorRT engines, in a pass of its own."
    )
    trtexec: bool = Field(
        default=False, description="Run the target's trtexec on each engine too, and say how far it differs."
    )
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

    @field_validator("scenarios")
    @classmethod
    def _with_latency(cls, scenarios: tuple[str, ...]) -> tuple[str, ...]:
        if "latency" not in scenarios or len(set(scenarios)) < len(scenarios):
            raise ValueError("latency must be among them, each once: every ratio comes from it")
        return scenarios


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
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_PTQ = "int8-ptq"
    INT8_QAT = "int8-qat"
    #: ONNX Runtime quantizes weights once and activations as they come: no calibration, no training.
    INT8_DYNAMIC = "int8-dynamic"
    #: TensorRT's own calibrator: TensorRT 10 and older, and the only int8 of its DLA.
    INT8_CALIBRATED = "int8-calibrated"

    @property
    def is_int8(self) -> bool:
        return self.value.startswith("int8")

    @property
    def has_quantizers(self) -> bool:
        """Whether the network itself is fake-quantized, and its ONNX form has Q/DQ."""
        return self in (Precision.INT8_PTQ, Precision.INT8_QAT)

    @property
    def exported(self) -> Precision:
        """What the exporter writes; the rest of the precision comes with lowering or on the target."""
        return self if self.has_quantizers else Precision.FP32


class EngineName(StrEnum):
    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Provider(StrEnum):
    """What ONNX Runtime calls its execution providers."""

    CPU = "CPUExecutionProvider"
    CUDA = "CUDAExecutionProvider"
    TENSORRT = "TensorrtExecutionProvider"


class Backend(Section):
    """What builds and runs an engine. ``providers`` is ONNX Runtime's, preferred first."""

    engine: EngineName
    providers: tuple[Provider, ...] = ()

    @property
    def name(self) -> str:
        """``tensorrt``, ``onnxruntime``, or ``onnxruntime-cuda`` where it is not on the CPU."""
        suffix = {Provider.CUDA: "-cuda", Provider.TENSORRT: "-tensorrt"}
        return str(self.engine) + "".join(suffix.get(provider, "") for provider in self.providers[:1])

    @property
    def uses_gpu(self) -> bool:
        return self.engine is EngineName.TENSORRT or any(p is not Provider.CPU for p in self.providers)

    @property
    def takes_tensorrt_onnx(self) -> bool:
        """Whether TensorRT parses the ONNX file, itself or inside ONNX Runtime."""
        return self.engine is EngineName.TENSORRT or self.providers[:1] == (Provider.TENSORRT,)


#: What a variant can name instead of the target's own engine, so that engines compare in one session.
BACKENDS = {
    "tensorrt": Backend(engine=EngineName.TENSORRT),
    "ort-cpu": Backend(engine=EngineName.ONNXRUNTIME, providers=(Provider.CPU,)),
    "ort-cuda": Backend(engine=EngineName.ONNXRUNTIME, providers=(Provider.CUDA, Provider.CPU)),
    "ort-tensorrt": Backend(
        engine=EngineName.ONNXRUNTIME, providers=(Provider.TENSORRT, Provider.CUDA, Provider.CPU)
    ),
}
_ON = "-on-"


class Variant(Section):
    """A row of the stage table, written ``pruned-int8-qat``, or ``pruned-fp16-on-ort-cuda`` with an engine, or
    ``pruned-int8-ptq-entropy`` with a calibration of its own."""

    stage: Stage
    precision: Precision
    calibration: CalibrationMethod | None = Field(
        default=None, description="How int8-ptq chooses its ranges; as the qat section says by default."
    )
    on: str | None = Field(default=None, description="Key of BACKENDS; the target's own engine by default.")

    @property
    def name(self) -> str:
        method = f"-{self.calibration}" if self.calibration else ""
        return f"{self.stage}-{self.precision}{method}" + (f"{_ON}{self.on}" if self.on else "")

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, _, on = value.partition(_ON)
        method = next((m for m in CalibrationMethod if name.endswith(f"{Precision.INT8_PTQ}-{m}")), None)
        name = name.removesuffix(f"-{method}")
        if name not in VARIANT_NAMES or (_ON in value and on not in BACKENDS):
            raise ValueError(
                f"unknown variant {value!r}; allowed: {', '.join(VARIANT_NAMES)}, behind {Precision.INT8_PTQ} "
                f"{', '.join(f'-{each}' for each in CalibrationMethod)}, and behind any of them "
                f"{', '.join(_ON + backend for backend in BACKENDS)}"
            )
        stage, _, precision = name.partition("-")
        return {"stage": stage, "precision": precision, "calibration": method, "on": on or None}


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


class CascadeConfig(Section):
    """A classifier behind the detector of this recipe, both as one unit with two engines."""

    classifier: str = Field(
        min_length=1,
        description="Recipe of the classifier, by name or file; its variants are those of this recipe.",
    )
    margin: float = Field(
        default=1.35, gt=0, description="Side of the square that is cut out, in longer sides of its box."
    )
    min_score: float = Field(default=0.2, ge=0, lt=1, description="Boxes below it are not classified.")
    max_iou: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="A box that overlaps a better one of any class by more is dropped.",
    )
    max_objects: int = Field(default=16, ge=1, description="Boxes of a frame that are classified, at most.")
    samples: int | None = Field(
        default=None, ge=24, description="Evaluation samples of the detector; all by default."
    )
    timeout_s: float = Field(default=600, gt=0, description="Longest session on a target.")


#: Keys of a recipe that no fallback may change: what is asked of it, and of whom.
FIXED_IN_PLAN_B = ("schema_version", "name", "gates", "targets", "plan_b")


class Fallback(Section):
    """One other way to pass the gates: the recipe with some keys changed."""

    name: Name = Field(description="What the report calls it, such as prune-more.")
    overrides: dict[str, Any] = Field(
        min_length=1,
        description="Values by dotted key, as in --set: {prune.pruning_ratio: 0.7}. A list is replaced as a whole.",
    )

    @field_validator("overrides")
    @classmethod
    def _same_goal(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        fixed = [key for key in overrides if key.split(".")[0] in FIXED_IN_PLAN_B]
        if fixed:
            raise ValueError(f"a fallback cannot change {', '.join(fixed)}: it must pass the same gates")
        return overrides


class PlanBConfig(Section):
    """What to try on a target that misses a gate. A list stands for its ``fallbacks`` alone."""

    fallbacks: tuple[Fallback, ...] = Field(
        min_length=1, description="In the order in which they are tried, until one passes."
    )
    max_tries: int | None = Field(default=None, ge=1, description="Fallbacks to try at most; all by default.")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="No fallback is begun later than this after the first; no limit by default.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, value: Any) -> Any:
        return {"fallbacks": value} if isinstance(value, (list, tuple)) else value

    @field_validator("fallbacks")
    @classmethod
    def _distinct(cls, fallbacks: tuple[Fallback, ...]) -> tuple[Fallback, ...]:
        names = [fallback.name for fallback in fallbacks]
        if len(set(names)) < len(names):
            raise ValueError(f"give every fallback a name of its own: {', '.join(names)}")
        return fallbacks


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
    sensitivity: SensitivityConfig | None = Field(
        default=None,
        description="Measure what pruning and int8 do to each part. Measured anyway where something is auto.",
    )
    prune: PruneConfig = PruneConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    qat: QatConfig = QatConfig()
    export: ExportConfig = ExportConfig()
    verify: VerifyConfig = VerifyConfig()
    build: BuildConfig = BuildConfig()
    tensorrt: TensorRtConfig = TensorRtConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cascade: CascadeConfig | None = Field(
        default=None, description="Let a classifier name what the detector of this recipe finds."
    )
    variants: tuple[Variant, ...] = Field(
        min_length=1, description="Rows of the stage table, baseline first."
    )
    gates: tuple[Gate, ...] = Field(default=(), description="Limits that decide the exit code.")
    plan_b: PlanBConfig | None = Field(
        default=None,
        description="Fallbacks for targets on which a gate fails, tried there one after the other.",
    )
    targets: tuple[TargetChoice, ...] = Field(
        default=("loopback",),
        min_length=1,
        description="Target files to deploy to, labels that select them (class=orin,site=lab), or all; "
        "--target overrides it.",
    )

    @property
    def pruning_sensitivity(self) -> SensitivityConfig | None:
        """How to measure it; None where it is not wanted."""
        automatic = self.prune.pruning_ratio == "auto"
        return self.sensitivity or (SensitivityConfig() if automatic else None)

    @property
    def int8_sensitivity(self) -> SensitivityConfig | None:
        automatic = self.qat.keep_float == "auto"
        return self.sensitivity or (SensitivityConfig() if automatic else None)

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
    def _measured_gates(self) -> Recipe:
        asked = {
            "in_flight_": (
                "benchmark.scenarios: [latency, throughput]",
                "throughput" in self.benchmark.scenarios or self.benchmark.trtexec,
            ),
            "trtexec_": ("benchmark.trtexec: true", self.benchmark.trtexec),
            "cascade_": ("cascade: {classifier: NAME}", self.cascade is not None),
            **dict.fromkeys(
                ("capture_", "preprocess_", "infer_", "postprocess_", "end_to_end_", "stream_"),
                ("benchmark.stream: {}", self.benchmark.stream is not None),
            ),
            **dict.fromkeys(
                ("power_w_", "energy_", "inferences_per_joule"),
                ("benchmark.power: {}", self.benchmark.power is not None),
            ),
        }
        for gate in self.gates:
            for prefix, (key, measured) in asked.items():
                if gate.metric.startswith(prefix) and not measured:
                    raise ValueError(f"the gate {gate.name!r} needs what {key} would measure")
        return self

    @model_validator(mode="after")
    def _int8_opset(self) -> Recipe:
        int8 = any(variant.precision.has_quantizers for variant in self.variants)
        if int8 and self.export.opset < 13:
            raise ValueError(
                f"export.opset is {self.export.opset}, but int8 variants need 13 or more (per-channel Q/DQ)"
            )
        return self


class Target(Section):
    """An SSH host and a folder on it."""

    schema_version: Literal[1] = Field(default=1, description="Version of this file format.")
    name: Name = Field(description="Name of the target, as in --target.")
    labels: dict[Name, Name] = Field(
        default_factory=dict,
        description="What to select it by, as in --target class=orin,site=lab. Boards of one class are alike, "
        "so that what one measured holds for the others.",
    )
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
        default=EngineName.ONNXRUNTIME,
        description="What builds and runs the engines of variants that name none themselves.",
    )
    providers: tuple[Provider, ...] = Field(
        default=(Provider.CPU,),
        min_length=1,
        description="ONNX Runtime's execution providers, preferred first. For engine: onnxruntime.",
    )
    power_mode: str | None = Field(
        default=None,
        pattern=POWER_MODE,
        description="Power mode of benchmarks by name, such as MAXN or 15W; whatever is set by default. "
        "Needs sudo without a password.",
    )
    lock_clocks: bool = Field(
        default=False, description="Hold clocks at their maximum while benchmarks run (jetson_clocks)."
    )
    orphan_grace_s: float = Field(
        default=30, ge=5, le=3600, description="A job whose host stays silent this long ends itself."
    )
    busy_timeout_s: float = Field(
        default=600,
        ge=0,
        description="How long to wait for an accelerator that another process's job holds; 0 fails at once. "
        "--busy-timeout-s overrides it.",
    )
    quarantine_after: int = Field(
        default=3,
        ge=0,
        le=100,
        description="INVALID measurements in a row after which runs on several targets leave it out; 0 is never.",
    )
    min_free_disk_mib: int = Field(default=512, ge=0, description="Free disk that preflight asks for.")
    min_free_memory_mib: int = Field(default=256, ge=0, description="Free memory that preflight asks for.")

    @property
    def target_class(self) -> str:
        """The label ``class``, and without one the target's own name: no board is taken to be like another.

        Measurements of one class may be held against each other, so a champion of the nightly flow is one of a
        recipe and a class. Every variant's run in MLflow has it as the tag ``target_class``.
        """
        return self.labels.get("class", self.name)

    @property
    def own_backend(self) -> Backend:
        """The engine of variants that name none."""
        providers = self.providers if self.engine is EngineName.ONNXRUNTIME else ()
        return Backend(engine=self.engine, providers=providers)

    def power_settings(self, benchmark: BenchmarkConfig) -> dict[str, Any]:
        """``power_mode`` and ``lock_clocks`` of measurements there; what the recipe says comes first."""
        locked = self.lock_clocks if benchmark.lock_clocks is None else benchmark.lock_clocks
        return {"power_mode": benchmark.power_mode or self.power_mode, "lock_clocks": locked}

    @property
    def leased_engine(self) -> EngineName:
        """The engine whose accelerator its jobs lease: TensorRT's, which is the GPU, wherever one is used."""
        return EngineName.TENSORRT if self.own_backend.uses_gpu else EngineName.ONNXRUNTIME

    def backend(self, variant: Variant) -> Backend:
        """The engine of this variant here."""
        return BACKENDS[variant.on] if variant.on else self.own_backend
