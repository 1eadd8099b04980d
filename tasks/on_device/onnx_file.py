"""What an ONNX file holds, read without the onnx package: its nodes, and the types and places of its weights.

The fields are those of onnx.proto. Weights are skipped over, so a large file costs little memory.
"""

import mmap
import os
from typing import Any, Dict, Iterator, Tuple

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INTEGER, ATTRIBUTE_TENSOR = 1, 3, 5
ATTRIBUTE_GRAPHS = (6, 11)
TENSOR_TYPE, TENSOR_EXTERNAL = 2, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
VARINT, LENGTH_DELIMITED = 0, 2
FIXED_BYTES = {1: 8, 5: 4}
TYPE_NAMES = {1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "fp16", 16: "bf16"}
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


class OnnxFile:
    """``nodes`` of the outer graph in the file's order: ``name``, ``operator`` and ``domain`` of each.

    ``types`` are those of weights, constants and casts, by the names of ``TYPE_NAMES``: what the file itself says of
    its precision. ``external_paths`` are the files beside it that hold weights. A file that is no ONNX has none.
    """

    def __init__(self, path: str) -> None:
        self.nodes = []  # type: Any
        self.types = set()  # type: Any
        self._locations = set()  # type: Any
        with open(path, "rb") as file:
            try:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read(data)
            except (ValueError, IndexError):
                pass  # empty, or cut off: the engine's own parser says so better
        folder = os.path.dirname(path)
        self.external_paths = [os.path.join(folder, name) for name in sorted(self._locations)]

    def _read(self, data: Any) -> None:
        for number, value in _fields(data, 0, len(data)):
            if number == MODEL_GRAPH:
                for inner, place in _fields(data, *value):
                    self._read_graph_field(data, inner, place)

    def _read_graph_field(self, data: Any, number: int, place: Tuple[int, int]) -> None:
        if number == GRAPH_NODE:
            self.nodes.append(self._node(data, place))
        elif number == GRAPH_INITIALIZER:
            self._note_tensor(data, place)

    def _note_subgraph(self, data: Any, place: Tuple[int, int]) -> None:
        """The branches of an If and the body of a Loop have weights of their own."""
        for number, value in _fields(data, *place):
            if number == GRAPH_NODE:
                self._node(data, value)
            elif number == GRAPH_INITIALIZER:
                self._note_tensor(data, value)

    def _node(self, data: Any, place: Tuple[int, int]) -> Dict[str, str]:
        texts = {NODE_NAME: "", NODE_OPERATOR: "", NODE_DOMAIN: ""}
        for number, value in _fields(data, *place):
            if number in texts:
                texts[number] = data[slice(*value)].decode("utf-8", "replace")
            elif number == NODE_ATTRIBUTE:
                self._read_attribute(data, value)
        return {"name": texts[NODE_NAME], "operator": texts[NODE_OPERATOR], "domain": texts[NODE_DOMAIN]}

    def _read_attribute(self, data: Any, place: Tuple[int, int]) -> None:
        name, integer = b"", 0
        for number, value in _fields(data, *place):
            if number == ATTRIBUTE_NAME:
                name = data[slice(*value)]
            elif number == ATTRIBUTE_INTEGER:
                integer = value[0]
            elif number == ATTRIBUTE_TENSOR:
                self._note_tensor(data, value)
            elif number in ATTRIBUTE_GRAPHS:
                self._note_subgraph(data, value)
        if name == b"to":  # of a Cast
            self._note(integer)

    def _note_tensor(self, data: Any, place: Tuple[int, int]) -> None:
        for number, value in _fields(data, *place):
            if number == TENSOR_TYPE:
                self._note(value[0])
            elif number == TENSOR_EXTERNAL:
                entry = {field: data[slice(*text)] for field, text in _fields(data, *value)}
                if entry.get(ENTRY_KEY) == b"location":
                    self._locations.add(entry.get(ENTRY_VALUE, b"").decode("utf-8", "replace"))

    def _note(self, number: int) -> None:
        self.types.add(TYPE_NAMES.get(number, "other"))

    def is_quantized(self) -> bool:
        """Whether it carries explicit quantization."""
        return any(node["operator"] in QUANTIZERS for node in self.nodes)


def _fields(data: Any, start: int, end: int) -> Iterator[Tuple[int, Tuple[int, int]]]:
    """Field numbers of a message with the place of each value, (start, end); of a number, (value, 0)."""
    while start < end:
        key, start = _varint(data, start)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, start = _varint(data, start)
            yield number, (value, 0)
            continue
        if kind == LENGTH_DELIMITED:
            length, start = _varint(data, start)
        elif kind in FIXED_BYTES:
            length = FIXED_BYTES[kind]
        else:
            raise ValueError("no protobuf")
        if start + length > end:
            raise ValueError("cut off")
        yield number, (start, start + length)
        start += length


def _varint(data: Any, start: int) -> Tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, start
