"""What a workload declares of frames: how one becomes the network's input, and outputs become results.

A device can do both from the declaration alone, without PyTorch; ``tasks/on_device/frames`` does, and DeepStream's
configuration is written from it. A frame is uint8 [height, width, channels], RGB or grey.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FrameInput(_Value):
    """The network's one input: a frame scaled bilinearly, then ``(value - mean) / deviation`` in grey levels."""

    name: str = Field(description="Name of the input, as in example_inputs.")
    size: tuple[Positive, Positive] = Field(description="Width and height in pixels.")
    colour: Literal["rgb", "bgr", "gray"] = Field(default="rgb", description="Order of the channels.")
    mean: tuple[float, ...] = Field(default=(), description="Grey level of each channel that becomes 0.")
    deviation: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(), description="Grey levels of each channel that become 1."
    )
    keep_aspect: bool = Field(
        default=False, description="Fit the frame into the middle instead of filling the input with it."
    )
    padding: Annotated[int, Field(ge=0, le=255)] = Field(
        default=0, description="Grey level around a frame whose aspect is kept."
    )
    dtype: Literal["float32", "uint8"] = "float32"

    @property
    def channels(self) -> int:
        return 1 if self.colour == "gray" else 3

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the network's input, for one frame."""
        return (1, self.channels, self.size[1], self.size[0])

    @model_validator(mode="before")
    @classmethod
    def _channelwise(cls, value: Any) -> Any:
        """0 and 1 where nothing is said."""
        channels = 1 if value.get("colour") == "gray" else 3
        plain = {"mean": (0.0,) * channels, "deviation": (1.0,) * channels}
        return {**value, **{key: value.get(key) or values for key, values in plain.items()}}

    @model_validator(mode="after")
    def _consistent(self) -> FrameInput:
        if not len(self.mean) == len(self.deviation) == self.channels:
            raise ValueError(f"mean and deviation must have {self.channels} values each for {self.colour}")
        if self.dtype == "uint8" and (any(self.mean) or set(self.deviation) != {1.0}):
            raise ValueError("an input of uint8 takes grey levels as they are: leave mean and deviation out")
        return self

    def frame_of(self, tensor: Tensor) -> NDArray[Any]:
        """The frame that becomes this input [channels, height, width], to the nearest grey level."""
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        pixels = (tensor.float() * deviation + mean).round().clamp(0, 255).byte()
        ordered = pixels.flip(0) if self.colour == "bgr" else pixels
        return ordered.permute(1, 2, 0).contiguous().numpy()


class Classes(_Value):
    """The ``top`` classes of one vector of logits."""

    kind: Literal["classes"] = "classes"
    output: str = Field(description="Output [1, classes].")
    top: Positive = 1


class Boxes(_Value):
    """Boxes of an anchor-free detector, decoded, and suppressed class by class.

    Cells are those of the finest stride first, row by row; a cell's centre is ``(index + 0.5) * stride``.
    """

    kind: Literal["boxes"] = "boxes"
    class_logits: str = Field(description="Output [1, classes, cells]; a sigmoid makes scores of them.")
    distances: str = Field(description="Output [1, 4, cells]: left, top, right, bottom, in strides.")
    strides: tuple[Positive, ...] = Field(min_length=1, description="Pixels between cells, a level each.")
    min_score: Share = Field(default=0.05, description="Detections below it are dropped.")
    max_iou: Share = Field(
        default=0.6, description="Those that overlap a better one of their class by more are dropped."
    )
    class_agnostic: bool = Field(default=False, description="Drop those that overlap one of any class.")


class Masks(_Value):
    """The likeliest class of each pixel."""

    kind: Literal["masks"] = "masks"
    output: str = Field(description="Output [1, classes, height, width].")
    upsample: bool = Field(default=True, description="Scale the logits bilinearly to the input's size.")


class FrameProcessing(_Value):
    """Both ends of a network that works on frames."""

    input: FrameInput
    results: Annotated[Classes | Boxes | Masks, Field(discriminator="kind")]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that the results are made of."""
        made_of = self.results
        return (made_of.class_logits, made_of.distances) if isinstance(made_of, Boxes) else (made_of.output,)
