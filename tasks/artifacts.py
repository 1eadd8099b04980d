"""Handles: frozen values that stand for a file in the store, and travel between stages in its place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Handle(BaseModel):
    """One file of the store. Two handles are the same when kind and digest are: the URI is only a hint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suffix: ClassVar[str] = ".bin"

    kind: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)
    parents: tuple[str, ...] = Field(default=(), description="sha256 of each handle it was made from")
    metadata: dict[str, Any] = Field(default_factory=dict, description="small JSON facts a reader may want")
    uri: str = Field(default="", description="where a copy was last seen; never part of a key")
    schema_version: int = SCHEMA_VERSION

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and (self.kind, self.sha256) == (other.kind, other.sha256)

    def __hash__(self) -> int:
        return hash((self.kind, self.sha256))


class Checkpoint(Handle):
    """Weights as safetensors. A pruned one carries its structure record, a quantized one its quantizers,
    each as JSON in the file's own metadata, so that one file is enough to rebuild the network."""

    suffix: ClassVar[str] = ".safetensors"
    kind: Literal["checkpoint"] = "checkpoint"


class OnnxModel(Handle):
    """An ONNX file, weights inside. ``metadata`` holds ``opset`` and ``precision``."""

    suffix: ClassVar[str] = ".onnx"
    kind: Literal["onnx"] = "onnx"


class Engine(Handle):
    """What a target built: the file, pulled back, and in ``metadata`` its passport."""

    suffix: ClassVar[str] = ".engine"
    kind: Literal["engine"] = "engine"


class Tensors(Handle):
    """Named arrays as safetensors: inputs for a target, or the outputs that came back."""

    suffix: ClassVar[str] = ".safetensors"
    kind: Literal["tensors"] = "tensors"


class Report(Handle):
    """A JSON document: an analysis, a verification, a table, samples."""

    suffix: ClassVar[str] = ".json"
    kind: Literal["report"] = "report"


class Figure(Handle):
    """A PNG chart."""

    suffix: ClassVar[str] = ".png"
    kind: Literal["figure"] = "figure"


class Clip(Handle):
    """Frames for a target: a video, a zip file of images, or a .npy array [frames, height, width, channels]."""

    kind: Literal["clip"] = "clip"


class Package(Handle):
    """A zip file with all that a device needs to run an engine without Jetway."""

    suffix: ClassVar[str] = ".zip"
    kind: Literal["package"] = "package"


AnyHandle = Annotated[
    Checkpoint | OnnxModel | Engine | Tensors | Report | Figure | Package, Field(discriminator="kind")
]


class StageOutput(BaseModel):
    """What a stage hands on: its main handle, further files to show a reviewer, and figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    handle: AnyHandle
    files: dict[str, AnyHandle] = Field(
        default_factory=dict, description="more artifacts, by the file name a reviewer sees"
    )
    metrics: dict[str, float] = Field(default_factory=dict, description="figures by their MLflow names")
    notes: tuple[str, ...] = Field(default=(), description="what was chosen and why, a sentence each")
    schema_version: int = SCHEMA_VERSION

    def handles(self) -> tuple[Handle, ...]:
        return (self.handle, *self.files.values())
