"""What the double "builds": a JSON description and the ONNX file, under a checksum. The layers are put together as
TensorRT names them: convolutions take in the activations behind them, Q/DQ pairs disappear into INT8 layers,
copies appear where a format changes, and a run of layers on DLA is one node."""

import hashlib
import json
import struct

from tensorrt import _settings, _values

MAGIC = b"TENSORRT DOUBLE\n"
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ABSORBED = ("BatchNormalization", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Add", "Mul", "HardSwish")
QUANTIZABLE = (*HEAVY, "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Relu")
SHAPES_ONLY = ("Constant", "Shape", "Identity")
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def pack(header, model):
    """A plan: magic, digest, header, ONNX."""
    text = json.dumps(header, sort_keys=True).encode()
    body = struct.pack("<Q", len(text)) + text + model
    return MAGIC + hashlib.sha256(body).digest() + body


def unpack(plan):
    """Header and ONNX. Raises ValueError for what is no plan, or not whole."""
    if not plan.startswith(MAGIC):
        raise ValueError("the magic tag does not match")
    digest, body = plan[len(MAGIC) : len(MAGIC) + 32], plan[len(MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("the checksum does not match")
    (length,) = struct.unpack_from("<Q", body)
    return json.loads(body[8 : 8 + length].decode()), body[8 + length :]


class Fusion:
    """The engine's layers: dicts of name, type, precision, inputs, outputs, device."""

    def __init__(self, network, precision_of, device_of):
        self.network = network
        self.precision_of, self.device_of = precision_of, device_of
        nodes = [layer._node for layer in network._layers]
        self.layer_of = {id(layer._node): layer for layer in network._layers}
        self.producer = {name: node for node in nodes for name in node.outputs}
        self.consumers = {}
        for node in nodes:
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)
        self.ends = {value.name for value in network._outputs}
        self.taken = set()
        self.layers = []
        self.types = {}
        for node in nodes:
            if id(node) not in self.taken and node.op_type not in SHAPES_ONLY:
                self._add(node)
        self._join_dla()
        self._add_reformats()

    def _add(self, node):
        if self._is_folded(node):
            return
        chain = self._chain(node)
        self.taken.update(id(each) for each in chain)
        names = self._weight_names(node) + [self._name(each) for each in chain]
        integer = self._is_integer(node)
        natural = self.precision_of(self.layer_of[id(chain[-1])])
        self.types[chain[-1].outputs[0]] = "INT8" if chain[-1].op_type == Q else natural
        self.layers.append(
            {
                "name": " + ".join(names),
                "type": self._kind(node),
                "precision": "INT8" if integer else self.precision_of(self.layer_of[id(node)]),
                "device": self.device_of(self.layer_of[id(node)]),
                "inputs": self._inputs_of(chain),
                "outputs": [chain[-1].outputs[0]],
                "nodes": [each.name for each in chain],
                "weights": self._weights(node),
            }
        )

    def _weights(self, node):
        """How many a layer with weights has; None for others."""
        known = (
            self.network._model.initializers.get(self._origin(node.inputs[1]))
            if node.op_type in HEAVY
            else None
        )
        count = 1
        for size in known.shape if known else []:
            count *= size
        return count if known else None

    def _origin(self, name):
        """The initializer behind the Q/DQ of a weight."""
        producer = self.producer.get(name)
        return (
            self._origin(producer.inputs[0]) if producer is not None and producer.op_type in (Q, DQ) else name
        )

    def _name(self, node):
        return self.layer_of[id(node)]._name

    def _kind(self, node):
        if node.op_type in HEAVY[:2]:
            return "CaskConvolution"
        return {"Gemm": "gemm", "MatMul": "gemm", Q: "Reformat", DQ: "Reformat"}.get(
            node.op_type, node.op_type
        )

    def _chain(self, node):
        """The node and what it takes in: it has one consumer, which is cheap."""
        chain = [node]
        while node.op_type in HEAVY and chain[-1].outputs[0] not in self.ends:
            after = self.consumers.get(chain[-1].outputs[0], [])
            if len(after) != 1 or after[0].op_type not in (*ABSORBED, Q) or id(after[0]) in self.taken:
                break
            if after[0].op_type == Q and not self._is_integer(node):
                break
            chain.append(after[0])
            if after[0].op_type == Q:
                break
        return chain

    def _is_folded(self, node):
        """Whether Q/DQ of a weight, or a DQ whose every consumer works on integers, is no layer of its own."""
        if node.op_type not in (Q, DQ):
            return False
        if self._is_weight(node.inputs[0]):
            return True
        after = self.consumers.get(node.outputs[0], [])
        return node.op_type == DQ and bool(after) and all(self._is_integer(each) for each in after)

    def _is_weight(self, name):
        producer = self.producer.get(name)
        if producer is not None and producer.op_type in (Q, DQ, "Identity"):
            return self._is_weight(producer.inputs[0])
        return name in self.network._model.initializers or getattr(producer, "op_type", "") == "Constant"

    def _is_integer(self, node):
        """Whether all that the node works on comes out of a DQ."""
        if node.op_type not in QUANTIZABLE:
            return False
        data = [name for name in node.inputs[:2] if name]
        sources = [self.producer.get(name) for name in data]
        return bool(sources) and all(source is not None and source.op_type == DQ for source in sources)

    def _weight_names(self, node):
        weights = [name for name in node.inputs if self._is_weight(name) and name in self.producer]
        quantizers = [self.producer[self.producer[name].inputs[0]] for name in weights
                      if self.producer[name].inputs[0] in self.producer]  # fmt: skip
        return [text for each in quantizers for text in (each.inputs[0], each.name)]

    def _inputs_of(self, chain):
        """What comes from outside the chain, weights apart."""
        inside = {name for node in chain for name in node.outputs}
        names = [name for node in chain for name in node.inputs if name and name not in inside]
        return [self._source(name) for name in names if not self._is_weight(name)]

    def _source(self, name):
        """Through a folded DQ to the tensor that the layer reads."""
        producer = self.producer.get(name)
        folded = producer is not None and producer.op_type == DQ and self._is_folded(producer)
        return producer.inputs[0] if folded else name

    def _join_dla(self):
        joined = []
        for layer in self.layers:
            if layer["device"] == "DLA" and joined and joined[-1]["device"] == "DLA":
                joined[-1]["outputs"] = layer["outputs"]
                joined[-1]["nodes"] += layer["nodes"]
            else:
                joined.append(layer)
        for layer in joined:
            if layer["device"] == "DLA":
                layer["name"] = "{{ForeignNode[{}...{}]}}".format(layer["nodes"][0], layer["nodes"][-1])
                layer["type"] = "DLA"
        self.layers = joined

    def _add_reformats(self):
        """A copy where a layer of lower precision reads a network's input or writes its output."""
        inputs, layers = {tensor._name for tensor in self.network._inputs}, []
        for layer in self.layers:
            low = layer["precision"] in ("FP16", "BF16", "INT8") and layer["type"] not in ("Cast", "Reformat")
            for index, name in enumerate(layer["inputs"]):
                if low and name in inputs:
                    layers.append(self._copy("Input", index, layer, name))
            layers.append(layer)
            result = layer["outputs"][0]
            if low and result in self.ends and self.network._tensors[result]._dtype == "FLOAT":
                layers.append(self._copy("Output", 0, layer, result))
        self.layers = layers

    def _copy(self, side, index, layer, tensor):
        """TensorRT gives the copy's other side a name of its own."""
        name = "Reformatting CopyNode for {} Tensor {} to {}".format(side, index, layer["name"])
        other = "Reformatted {} Tensor {} to {}".format(side, index, layer["name"])
        self.types[other] = layer["precision"]
        ends = ([tensor], [other]) if side == "Input" else ([other], [tensor])
        changed = {"Input": "inputs", "Output": "outputs"}[side]
        layer[changed] = [other if each == tensor else each for each in layer[changed]]
        plain = {"device": "GPU", "nodes": [], "weights": None, "precision": "FP32"}
        return dict(plain, name=name, type="Reformat", inputs=ends[0], outputs=ends[1])


def information(header):
    """The inspector's JSON of a plan: up to 10.x with bindings by name, from 11 on with described tensors."""
    detailed = header["verbosity"] == "DETAILED"
    layers = [] if header["verbosity"] == "NONE" else header["layers"]
    described = [layer_information(header, layer) if detailed else layer["name"] for layer in layers]
    if _settings.MAJOR < 11:
        return {"Layers": described, "Bindings": [tensor["name"] for tensor in header["tensors"]]}
    return {"Layers": described, "I/O Tensors": [_io_tensor(header, tensor) for tensor in header["tensors"]]}


WEIGHT_TYPES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8"}


def layer_information(header, layer):
    described = {
        "Name": layer["name"],
        "LayerType": layer["type"],
        "Inputs": [_tensor(header, name) for name in layer["inputs"]],
        "Outputs": [_tensor(header, name) for name in layer["outputs"]],
        "TacticName": "the double has no tactics",
        "StreamId": 0,
        "Metadata": "".join(f"[ONNX Layer: {name}]" for name in layer["nodes"]),
    }
    if layer["weights"]:
        described["Weights"] = {"Type": WEIGHT_TYPES[layer["precision"]], "Count": layer["weights"]}
    return described


def _tensor(header, name):
    known = {tensor["name"]: tensor for tensor in header["tensors"]}.get(name)
    precision = header["types"].get(name, "FP32")
    if known:
        precision = _values.SHORT_NAMES.get(known["dtype"], known["dtype"])
    shape = known["shape"] if known else header["shapes"].get(name, [])
    described = {"Name": name, "Location": "Device", "Dimensions": shape}
    precision = {"INT8": "Int8"}.get(precision, precision)
    if _settings.MAJOR < 11:
        kind = "{} format" if precision == "Int8" else "linear {} format"
        described["Format/Datatype"] = "Row major " + kind.format(precision)
    else:
        described.update(Format="Row major linear", DataType=precision)
    return described


def _io_tensor(header, tensor):
    profiles = [profile.get(tensor["name"], [tensor["shape"]] * 3) for profile in header["profiles"]]
    shapes = [
        dict(zip(("MinShape", "OptShape", "MaxShape"), shapes), Format="Row major linear")
        for shapes in profiles
    ]
    return {
        "Name": tensor["name"],
        "IOMode": "Input" if tensor["input"] else "Output",
        "DataType": _values.SHORT_NAMES.get(tensor["dtype"], tensor["dtype"]),
        "Dimensions": tensor["shape"],
        "Location": "Device",
        "IsShapeInferenceIO": False,
        "ProfileInfo": shapes,
    }
