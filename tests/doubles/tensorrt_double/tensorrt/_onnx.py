"""Reads ONNX files with the standard library: the fields of onnx.proto that a parser needs, and no more."""

import os
import struct

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 7, 9, 10, 16
ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, BOOL: 1, FLOAT16: 2, BFLOAT16: 2, 11: 8}
EXTERNAL = 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class NotOnnx(ValueError):
    """The bytes are no ONNX model, or miss something."""


def fields(data):
    """Number, wire type and value of each field; a length-delimited value is bytes, others are integers."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
        elif wire == BYTES:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            if len(value) != length:
                raise NotOnnx("it ends early")
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
            value, at = int.from_bytes(data[at : at + length], "little"), at + length
        else:
            raise NotOnnx("it is no protobuf")
        yield key >> 3, wire, value


def _varint(data, at):
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise NotOnnx("it ends early")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def encode(number, wire, value):
    """A field as bytes, the reverse of ``fields``."""
    key = _encode_varint(number << 3 | wire)
    if wire == VARINT:
        return key + _encode_varint(value)
    if wire == BYTES:
        return key + _encode_varint(len(value)) + value
    return key + value.to_bytes(8 if wire == FIXED64 else 4, "little")


def _encode_varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def _integers(wire, value):
    """Of a repeated integer field: one, or packed many."""
    if wire != BYTES:
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(_signed(number))
    return found


class Message:
    """Fields by number, in order of appearance."""

    def __init__(self, data):
        self.fields = {}
        for number, wire, value in fields(data):
            self.fields.setdefault(number, []).append((wire, value))

    def texts(self, number):
        return [value.decode("utf-8", "replace") for _, value in self.fields.get(number, [])]

    def text(self, number):
        return (self.texts(number) or [""])[-1]

    def integers(self, number):
        return [each for wire, value in self.fields.get(number, []) for each in _integers(wire, value)]

    def integer(self, number):
        return (self.integers(number) or [0])[-1]

    def blobs(self, number):
        return [value for _, value in self.fields.get(number, [])]

    def blob(self, number):
        return (self.blobs(number) or [b""])[-1]


class Tensor:
    def __init__(self, data):
        message = Message(data)
        self.name = message.text(8)
        self.shape = message.integers(1)
        self.elem_type = message.integer(2)
        self.message = message

    def is_zero(self):
        """Whether all its values are 0; a tensor in another file is not looked at."""
        integers = self.message.integers(5) + self.message.integers(7)
        return not any(self.message.blob(9)) and not any(integers) and not any(self.message.blob(4))


class Node:
    def __init__(self, data, index):
        message = Message(data)
        self.index = index
        self.inputs, self.outputs = message.texts(1), message.texts(2)
        self.op_type, self.domain = message.text(4), message.text(7)
        self.name = message.text(3) or "node_of_{}".format((self.outputs or [""])[0])
        self.attributes = {each.text(1): each for each in map(Message, message.blobs(5))}

    def integer(self, name, otherwise=0):
        attribute = self.attributes.get(name)
        return attribute.integer(3) if attribute else otherwise

    def tensor(self, name):
        attribute = self.attributes.get(name)
        return Tensor(attribute.blob(5)) if attribute and attribute.blob(5) else None


class Value:
    """A graph's input, output or inner value: dims are integers, or names of sizes that are not fixed."""

    def __init__(self, data):
        message = Message(data)
        self.name = message.text(1)
        tensor = Message(Message(message.blob(2)).blob(1))
        self.elem_type = tensor.integer(1)
        dims = [Message(dim) for dim in Message(tensor.blob(2)).blobs(1)]
        self.dims = [dim.integer(1) if 1 in dim.fields else dim.text(2) or "?" for dim in dims]

    def shape(self):
        return tuple(size if isinstance(size, int) else -1 for size in self.dims)


class Model:
    """A parsed ONNX file. Raises NotOnnx."""

    def __init__(self, data):
        message = Message(data)
        graph = Message(message.blob(7))
        if not graph.fields:
            raise NotOnnx("it has no graph")
        opsets = [Message(each) for each in message.blobs(8)]
        self.opset = max([each.integer(2) for each in opsets if each.text(1) in ("", "ai.onnx")] or [0])
        self.name = graph.text(2)
        self.nodes = [Node(each, index) for index, each in enumerate(graph.blobs(1))]
        self.initializers = {each.name: each for each in map(Tensor, graph.blobs(5))}
        values = [Value(each) for each in graph.blobs(11)]
        self.inputs = [value for value in values if value.name not in self.initializers]
        self.outputs = [Value(each) for each in graph.blobs(12)]
        self.values = {each.name: each for each in map(Value, graph.blobs(13))}
        for value in self.inputs + self.outputs:
            self.values[value.name] = value


def self_contained(data, folder):
    """The model with the data of other files inside. Raises NotOnnx when one is missing or too short."""
    return _rewrite(data, {7: lambda graph: _rewrite(graph, {5: lambda tensor: _inline(tensor, folder)})})


def in_float32(data):
    """The model with bfloat16 tensors and casts turned into float32, for a CPU that has no bfloat16."""
    graph = {
        1: lambda node: _rewrite(node, {5: _attribute_in_float32}),
        5: _tensor_in_float32,
        11: _value_in_float32,
        12: _value_in_float32,
        13: _value_in_float32,
    }
    return _rewrite(data, {7: lambda blob: _rewrite(blob, graph)})


def _rewrite(data, changes):
    """The message with the changes, by field number, made to its length-delimited fields."""
    parts = []
    for number, wire, value in fields(data):
        if wire == BYTES and number in changes:
            value = changes[number](value)
        parts.append(encode(number, wire, value))
    return b"".join(parts)


def _inline(tensor, folder):
    message = Message(tensor)
    if message.integer(14) != EXTERNAL:
        return tensor
    entries = {each.text(1): each.text(2) for each in map(Message, message.blobs(13))}
    path = os.path.join(folder, entries.get("location", ""))
    try:
        with open(path, "rb") as file:
            file.seek(int(entries.get("offset", 0)))
            data = file.read(int(entries["length"]) if "length" in entries else -1)
    except OSError as exc:
        raise NotOnnx(f"Failed to open file: {exc}") from exc
    _require_bytes(Tensor(tensor), data, path)
    kept = [encode(*field) for field in fields(tensor) if field[0] not in (9, 13, 14)]
    return b"".join(kept) + encode(9, BYTES, data)


def _require_bytes(tensor, data, path):
    count = 1
    for size in tensor.shape:
        count *= size
    if len(data) != count * ITEM_BYTES.get(tensor.elem_type, 1):
        raise NotOnnx(f"{path} has {len(data)} bytes for tensor {tensor.name}")


def _tensor_in_float32(tensor):
    message = Message(tensor)
    if message.integer(2) != BFLOAT16:
        return tensor
    halves = message.blob(9) or struct.pack(f"<{len(message.integers(5))}H", *message.integers(5))
    wide = b"".join(b"\0\0" + halves[at : at + 2] for at in range(0, len(halves), 2))
    kept = [encode(*field) for field in fields(tensor) if field[0] not in (2, 5, 9)]
    return b"".join(kept) + encode(2, VARINT, FLOAT) + encode(9, BYTES, wide)


def _attribute_in_float32(attribute):
    message = Message(attribute)
    changed = _rewrite(attribute, {5: _tensor_in_float32})
    if message.text(1) != "to" or message.integer(3) != BFLOAT16:
        return changed
    return b"".join(
        encode(number, wire, FLOAT if number == 3 else value) for number, wire, value in fields(changed)
    )


def _value_in_float32(value):
    def elem(tensor):
        return b"".join(
            encode(number, wire, FLOAT if number == 1 and field == BFLOAT16 else field)
            for number, wire, field in fields(tensor)
        )

    return _rewrite(value, {2: lambda kind: _rewrite(kind, {1: elem})})
