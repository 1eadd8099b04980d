"""Layers of a built TensorRT engine, and the ONNX nodes that TensorRT fused into each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

_ROW_FIELDS = ("name", "type", "precision", "time_ms", "share_ratio", "onnx_nodes")
_WRAPPED = re.compile(r"^(?:PWN|Pointwise|fusedPointwiseNode)\((.*)\)$")
#: A region that TensorRT compiled as a whole names its first and its last node.
_REGION = re.compile(r"^\{ForeignNode\[(.*)\]\}$")
_REFORMAT = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ (?:to|from) (.*)$")
_QUANTIZERS = re.compile(r"QuantizeLinear|DequantizeLinear|_quantized?\b|_dequantized?\b")


class Layer(BaseModel):
    """One layer as the target's engine has it, in execution order; ``time_ms`` is its median a query."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    type: str | None = None
    precision: str | None = Field(
        default=None, description="fp32, fp16, bf16, int8 or mixed; None where the engine does not tell."
    )
    time_ms: float | None = None
    share_ratio: float | None = None
    onnx_nodes: tuple[str, ...] = Field(default=(), description="Told by newer engines.")

    @property
    def nodes(self) -> frozenset[str]:
        """The ONNX nodes in it that compute, without quantizers: by these two engines' layers are joined."""
        return frozenset(name for name in self.onnx_nodes or node_names(self.name) if not is_quantizer(name))

    @property
    def is_reformat(self) -> bool:
        """A copy into another format or type, which computes nothing."""
        return _REFORMAT.match(self.name) is not None or (
            self.type == "Reformat" and not is_quantizer(self.name)
        )

    @property
    def serves(self) -> frozenset[str]:
        """For a reformat, the ONNX nodes of the layer that it is for."""
        match = _REFORMAT.match(self.name)
        return frozenset(node_names(match[1])) if match else frozenset()

    @property
    def is_quantizer(self) -> bool:
        """A quantization that no other layer took in."""
        return not self.is_reformat and not self.nodes and is_quantizer(self.name)


def node_names(fused: str) -> list[str]:
    """The names that TensorRT joined: ``conv1 + PWN(relu1)``, ``conv2 || conv3``."""
    names = []
    for part in re.split(r" \+ | \|\| ", fused.strip()):
        match = _WRAPPED.match(part)
        region = _REGION.match(part)
        if match:
            names += [name for inner in match[1].split(", ") for name in node_names(inner)]
        elif region:
            names += region[1].split("...")
        elif part:
            names.append(part)
    return names


def is_quantizer(name: str) -> bool:
    return _QUANTIZERS.search(name) is not None


def layers_csv(layers: Sequence[Layer]) -> str:
    """The table as a file that spreadsheets and MLflow's artifact viewer open."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_ROW_FIELDS)
    for layer in layers:
        values = [getattr(layer, field) for field in _ROW_FIELDS[:-1]]
        writer.writerow(
            [*("" if value is None else value for value in values), " ".join(sorted(layer.nodes))]
        )
    return text.getvalue()
