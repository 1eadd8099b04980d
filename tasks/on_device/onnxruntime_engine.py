"""ONNX Runtime as an engine: the only file that imports it.

"Building" is graph optimization at ORT_ENABLE_ALL, fusions and the CPU's own blocked layouts included, saved
as an ONNX file. The saved graph is final, so it is loaded with optimization off: what runs is the file,
operator for operator, at the speed of a plain ORT_ENABLE_ALL session. The TensorRT provider compiles when it loads,
and what it compiles cannot be saved in the graph: there the engine is the ONNX file as it is, and the compiled parts
lie in a folder beside it, whose names for them come from the engine's.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from typing import Any, Callable, Dict, List, Tuple

from jetway.tasks.on_device import errors, gpu, machine, outputs, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.tensors import Tensor

NAME = "onnxruntime"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# What the TensorRT provider must be told for types that the file has: it sets flags as TensorRT 8 does.
TENSORRT_FLAGS = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}
# Idle sessions that spin for work take the cores from the one that is timed.
NO_SPINNING = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
# On x86 without VNNI, uint8 times int8 saturates in 16 bits. This takes exact kernels, which are slower (2.9
# times where VNNI is there, measured), so it is set where it is needed.
EXACT_INT8 = {"session.x64quantprecision": "1"}
LOWEST_OPSET = 7
HIGHEST_OPSET = 127  # of a hand-written file; ALLOW_RELEASED_ONNX_OPSET_ONLY=0 accepts any
LOG_FATAL_ONLY = 4
# Samples a call, where the engine leaves the batch open.
OPEN_BATCH = 32


def import_engine() -> Any:
    """The onnxruntime module. Raises DeviceError (mismatch) with the reason when it cannot be imported."""
    try:
        import numpy  # noqa: F401
        import onnxruntime
    except Exception as exc:  # a broken installation raises whatever it likes
        raise DeviceError(
            "This Python cannot import onnxruntime: {}: {}. Install it there, or name another interpreter in "
            "the target's `python`.".format(type(exc).__name__, exc),
            errors.MISMATCH,
        )
    return onnxruntime


def version() -> str:
    return str(import_engine().__version__)


def facts() -> Dict[str, Any]:
    try:
        module = import_engine()
    except DeviceError as exc:
        return {"available": False, "reason": str(exc)}
    return {
        "available": True,
        "version": module.__version__,
        "providers": module.get_available_providers(),
        "max_opset": max_opset(),
    }


def platform_facts(load_options: Dict[str, Any]) -> Dict[str, Any]:
    """What an engine built here depends on; the GPU too, where a provider uses it."""
    cpu = machine.cpu()
    found = {
        "engine": NAME,
        "engine_version": version(),
        "architecture": cpu["architecture"],
        "instruction_sets": cpu["instruction_sets"],
    }
    return dict(found, gpu=gpu.identity()) if uses_gpu(load_options) else found


def uses_gpu(options: Dict[str, Any]) -> bool:
    return bool(set(options["providers"]) & {CUDA, TENSORRT})


def build_options(request: Dict[str, Any]) -> Dict[str, Any]:
    """Every option that a build sets, as it stands in the passport."""
    providers = providers_of(request.get("options") or {})
    options = {
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "execution_mode": "ORT_SEQUENTIAL",
        "intra_op_num_threads": request["threads"],
        "inter_op_num_threads": 1,
        "providers": providers,
        "config_entries": config_entries(machine.cpu()),
    }
    if TENSORRT in providers:
        options["provider_options"] = {TENSORRT: tensorrt_flags(OnnxFile(request["onnx"]))}
    return options


def tensorrt_flags(onnx: OnnxFile) -> Dict[str, str]:
    types = onnx.types & {"fp16", "bf16"} | ({"int8"} if onnx.is_quantized() else set())
    return {TENSORRT_FLAGS[name]: "True" for name in sorted(types)}


def providers_of(asked: Dict[str, Any]) -> List[str]:
    """The execution providers asked for, and behind them those that take what they cannot run.

    Raises DeviceError (mismatch) for one that this onnxruntime lacks.
    """
    wanted = list(asked.get("providers") or [CPU])
    there = import_engine().get_available_providers()
    absent = [name for name in wanted if name not in there]
    if absent:
        raise DeviceError(
            "The target's onnxruntime {} has no {}; it has {}. Install one that has it (onnxruntime-gpu, or NVIDIA's "
            "for this JetPack), or change `providers`.".format(
                version(), ", ".join(absent), ", ".join(there)
            ),
            errors.MISMATCH,
        )
    behind = [CUDA, CPU] if TENSORRT in wanted else [CPU]
    return wanted + [name for name in behind if name in there and name not in wanted]


def config_entries(cpu: Dict[str, Any]) -> Dict[str, str]:
    """Session configuration for a CPU, as ``machine.cpu`` describes it."""
    saturates = cpu["architecture"] in ("x86_64", "AMD64") and not cpu["int8_instruction_sets"]
    return dict(NO_SPINNING, **(EXACT_INT8 if saturates else {}))


def load_options(request: Dict[str, Any]) -> Dict[str, Any]:
    """The same for running a built engine, whose graph is final unless TensorRT has yet to compile it."""
    options = build_options(request)
    return options if TENSORRT in options["providers"] else _final(options)


def _final(options: Dict[str, Any]) -> Dict[str, Any]:
    return dict(options, graph_optimization_level="ORT_DISABLE_ALL")


def _native_options(options: Dict[str, Any]) -> Any:
    ort = import_engine()
    native = ort.SessionOptions()
    native.graph_optimization_level = getattr(ort.GraphOptimizationLevel, options["graph_optimization_level"])
    native.execution_mode = getattr(ort.ExecutionMode, options["execution_mode"])
    native.intra_op_num_threads = options["intra_op_num_threads"]
    native.inter_op_num_threads = options["inter_op_num_threads"]
    native.log_severity_level = LOG_FATAL_ONLY
    for key, value in options["config_entries"].items():
        native.add_session_config_entry(key, value)
    return native


def build(
    request: Dict[str, Any], engine_path: str, progress: Callable[[Dict[str, Any]], None]
) -> Dict[str, Any]:
    """Optimizes the ONNX file for this machine and writes the result. Raises DeviceError with its cause."""
    options = build_options(request)
    _check_whole(OnnxFile(request["onnx"]))
    if TENSORRT in options["providers"]:
        shutil.copyfile(request["onnx"], engine_path)
        return {}
    native = _native_options(options)
    native.optimized_model_filepath = engine_path
    try:
        _open(request["onnx"], native, options)
    except DeviceError:
        raise
    except Exception as exc:  # ONNX Runtime's exceptions have no base class of their own
        raise build_error(exc, request["onnx"], os.path.dirname(engine_path))
    return {}


def _check_whole(onnx: OnnxFile) -> None:
    """What is saved would go on pointing at weights in files of their own, from another folder."""
    if onnx.external_paths:
        names = ", ".join(os.path.basename(path) for path in onnx.external_paths)
        raise DeviceError(
            "The network's weights lie in {}, and ONNX Runtime's engine is one file. Export the network with its "
            "weights inside.".format(names),
            errors.BAD_REQUEST,
        )


def _open(path: str, native: Any, options: Dict[str, Any]) -> Any:
    """An InferenceSession whose first provider is really there: ONNX Runtime falls back without an error.

    It would do so in the middle of a measurement too, when a provider fails; there it is told not to.
    """
    providers = [(name, _provider_options(name, path, options)) for name in options["providers"]]
    session = import_engine().InferenceSession(path, native, providers=providers)
    session.disable_fallback()
    if options["providers"][0] not in session.get_providers():
        raise DeviceError(
            "ONNX Runtime {} could not start its {} and went on with {}. See the log for the library that it misses: "
            "CUDA, cuDNN and TensorRT must be the versions it was built for.".format(
                version(), options["providers"][0], ", ".join(session.get_providers())
            ),
            errors.MISMATCH,
        )
    return session


def _provider_options(name: str, path: str, options: Dict[str, Any]) -> Dict[str, str]:
    """The TensorRT provider keeps what it compiles beside the engine, for the next time it is loaded."""
    given = options.get("provider_options", {}).get(name, {})  # type: Dict[str, str]
    if name != TENSORRT:
        return given
    return dict(given, trt_engine_cache_enable="True", trt_engine_cache_path=outputs.compiled_folder(path))


class OnnxRuntimeSession:
    """A loaded engine. Construction loads it; ``run`` may be called any number of times.

    ``options`` are ``load_options``, as they stand in its passport.
    """

    def __init__(self, path: str, options: Dict[str, Any]) -> None:
        native = _native_options(options)
        try:
            self._session = _open(path, native, options)
        except DeviceError:
            raise
        except Exception as exc:
            raise DeviceError(
                "ONNX Runtime cannot load {}: {}".format(path, exc), _kind_of(exc, errors.MISMATCH)
            )
        self.output_names = [node.name for node in self._session.get_outputs()]
        self.input_shapes = {node.name: node.shape for node in self._session.get_inputs()}

    def close(self) -> None:
        """Gives its memory back; no other method works after it."""
        self._session = None

    def batch_limits(self) -> Tuple[int, int]:
        """Fewest samples that a call takes, and the number that suits it."""
        sizes = [shape[0] for shape in self.input_shapes.values() if shape]
        static = sizes and all(isinstance(size, int) for size in sizes)
        return (sizes[0], sizes[0]) if static else (1, OPEN_BATCH)

    def run(self, inputs: Dict[str, Any]) -> List[Any]:
        """Outputs in the order of ``output_names``. Untranslated errors: this is the timed call."""
        outputs = self._session.run(None, inputs)  # type: List[Any]
        return outputs

    def inputs_of(self, given: Dict[str, Tensor]) -> Dict[str, Any]:
        """The arrays that the engine takes; an input that the network does not use is not in its graph."""
        return {name: tensor.numpy() for name, tensor in tensors.picked(self.input_shapes, given).items()}

    def query(self, inputs: Dict[str, Any]) -> Callable[[], Any]:
        """The call that is timed, for inputs that do not change."""
        return lambda: self.run(inputs)

    def run_checked(self, inputs: Dict[str, Any]) -> List[Any]:
        """``run`` with an error that shows the inputs."""
        try:
            return self.run(inputs)
        except Exception as exc:
            shapes = {name: "{}{}".format(array.dtype, list(array.shape)) for name, array in inputs.items()}
            raise DeviceError(
                "The engine fails on the inputs {}: {}".format(shapes, exc), _kind_of(exc, errors.FAILED)
            )


Session = OnnxRuntimeSession

OUT_OF_MEMORY_WORDS = re.compile(r"allocate memory|bad_alloc|out of memory|bad allocation", re.IGNORECASE)
DISK_FULL_WORDS = re.compile(r"no space left|disk quota exceeded", re.IGNORECASE)
UNSUPPORTED_WORDS = re.compile(
    r"No Op registered for|is not a registered function/op|NOT_IMPLEMENTED|Could not find an implementation"
)
TOO_NEW_WORDS = re.compile(r"Opset \d+ is under development|Unsupported model IR version")
FAILING_NODE = (
    re.compile(r'In Node, \("(?P<node>[^"]*)", (?P<operator>[^,]+),'),
    re.compile(r"implementation for (?P<operator>\S+) node with name '(?P<node>[^']*)'"),
    re.compile(r"Fatal error: (?P<operator>\S+) is not a registered function/op"),
)


def _kind_of(exc: Exception, otherwise: str) -> str:
    if isinstance(exc, MemoryError) or OUT_OF_MEMORY_WORDS.search(str(exc)):
        return errors.OUT_OF_MEMORY
    return otherwise


def build_error(exc: Exception, onnx_path: str, folder: str) -> DeviceError:
    """What a failed build means, in one word of ``cause`` and a sentence on what to do."""
    text = " ".join(str(exc).split())
    if TOO_NEW_WORDS.search(text):
        return DeviceError(
            "ONNX Runtime {} is too old for this file: {}. Lower export.opset in the recipe, or install a "
            "newer onnxruntime on the target.".format(version(), text),
            errors.MISMATCH,
        )
    if _kind_of(exc, "") == errors.OUT_OF_MEMORY:
        return _build_failed(
            "out_of_memory", "The build ran out of memory", text, "free memory on the target"
        )
    if DISK_FULL_WORDS.search(text) or not _has_room(folder, os.path.getsize(onnx_path)):
        return _build_failed("disk_full", "The disk of {} is full".format(folder), text, "free some of it")
    if UNSUPPORTED_WORDS.search(text):
        return _build_failed("unsupported_operator", unsupported_operator(text), text, "replace that layer")
    return _build_failed("unknown", "ONNX Runtime cannot build {}".format(onnx_path), text, "export it again")


def _build_failed(cause: str, what: str, text: str, advice: str) -> DeviceError:
    return DeviceError("{}; {}. ONNX Runtime says: {}".format(what, advice, text), errors.BUILD_FAILED, cause)


def unsupported_operator(text: str) -> str:
    """The operator and node that ONNX Runtime's message is about."""
    for pattern in FAILING_NODE:
        match = pattern.search(text)
        if match:
            named = match.groupdict()
            node = " (node {!r})".format(named["node"]) if named.get("node") else ""
            return "ONNX Runtime {} has no operator {}{}".format(version(), named["operator"].strip(), node)
    return "ONNX Runtime {} lacks an operator".format(version())


def _has_room(folder: str, size: int) -> bool:
    """Whether so many bytes can be had, quota included. ONNX Runtime does not say why it could not write."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as exc:
        return exc.errno not in (errno.ENOSPC, errno.EDQUOT)
    return True


def inspect(engine_path: str, options: Dict[str, Any], inputs: Dict[str, Any]) -> Dict[str, Any]:
    """What runs: operators and MACs, of the kernels as they are, so a blocked layout's padding counts."""
    costs = operator_costs(engine_path, options, inputs)
    return {
        "operators": _counts([cost["operator"] for cost in costs]),
        "placement": _counts([cost["provider"] for cost in costs]),
        "macs": sum(cost["macs"] for cost in costs),
        "integer_macs_ratio": integer_macs_ratio(costs),
        "uncounted_operators": sorted({cost["operator"] for cost in costs if not cost["counted"]}),
    }


def _counts(names: List[str]) -> Dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def integer_macs_ratio(costs: List[Dict[str, Any]]) -> float:
    """Share of the multiply-accumulates that run in integer kernels; 0 for a network that has none."""
    total = sum(cost["macs"] for cost in costs)
    return sum(cost["macs"] for cost in costs if cost["integer"]) / total if total else 0.0


def operator_costs(engine_path: str, options: Dict[str, Any], inputs: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Every executed operator with the shapes it really saw, from ONNX Runtime's own profile of one run.

    Prepacking is off in this session, because packed weights lose their shape.
    """
    entries = dict(options["config_entries"], **{"session.disable_prepacking": "1"})
    native = _native_options(dict(options, config_entries=entries))
    native.enable_profiling = True
    with tempfile.TemporaryDirectory(dir=os.curdir) as folder:
        native.profile_file_prefix = os.path.join(folder, "profile")
        session = _open(engine_path, native, options)
        session.run(None, inputs)
        with open(session.end_profiling()) as file:
            events = json.load(file)
    return [_operator(event["args"]) for event in events if event["name"].endswith("_kernel_time")]


def _operator(args: Dict[str, Any]) -> Dict[str, Any]:
    operands = [_operand(entry) for entry in args["input_type_shape"]]
    outputs = [_operand(entry) for entry in args["output_type_shape"]]
    macs, counted = count_macs(args["op_name"], operands, outputs)
    return {
        "operator": args["op_name"],
        "provider": args["provider"],
        "macs": macs,
        "counted": counted,
        "integer": any(operand["dtype"] in ("int8", "uint8") for operand in operands),
    }


def _operand(entry: Dict[str, List[int]]) -> Dict[str, Any]:
    ((dtype, shape),) = entry.items()
    return {"dtype": dtype, "shape": shape}


# Where the weight stands among the operands, for convolutions; and the operators that multiply matrices.
CONVOLUTION_WEIGHT = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "QConv": 3,
}
MATRIX_PRODUCTS = (
    "Gemm",
    "FusedGemm",
    "QGemm",
    "MatMul",
    "FusedMatMul",
    "TransposeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "DynamicQuantizeMatMul",
)
# They multiply too, in ways that shapes alone do not tell.
UNCOUNTED = (
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "QAttention",
    "LSTM",
    "GRU",
    "RNN",
    "DynamicQuantizeLSTM",
    "Einsum",
    "DeformConv",
)
COMPILED = "TRTKernel"  # a part of the network that the TensorRT provider took whole


def count_macs(operator: str, operands: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> Any:
    """Multiply-accumulates of one operator, and whether its kind can be counted at all."""
    if operator in CONVOLUTION_WEIGHT:
        weight = operands[CONVOLUTION_WEIGHT[operator]]["shape"]
        return _product(outputs[0]["shape"]) * _product(weight[1:]), True
    if operator == "ConvTranspose":
        return _product(operands[0]["shape"]) * _product(operands[1]["shape"][1:]), True
    if operator in MATRIX_PRODUCTS:
        return _matrix_product_macs(operator, operands[0]["shape"], outputs[0]["shape"]), True
    return 0, operator not in UNCOUNTED and not operator.startswith(COMPILED)


def _matrix_product_macs(operator: str, left: List[int], output: List[int]) -> int:
    """Output elements times the summed dimension, which Gemm may hold transposed."""
    if operator.endswith("Gemm"):
        return _product(left) * output[-1]
    return _product(output) * left[-1]


def _product(sizes: List[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def max_opset() -> int:
    """Newest operator set that this ONNX Runtime loads, found by loading files of one node."""
    opset = LOWEST_OPSET
    while opset < HIGHEST_OPSET and _loads_opset(opset + 1):
        opset += 1
    return opset


def _loads_opset(opset: int) -> bool:
    ort = import_engine()
    native = ort.SessionOptions()
    native.log_severity_level = LOG_FATAL_ONLY
    try:
        ort.InferenceSession(one_node_onnx(opset), native, providers=[CPU])
    except Exception:
        return False
    return True


def one_node_onnx(opset: int) -> bytes:
    """An ONNX file of one Relu, byte by byte, as a target has no onnx package. Fields as in onnx.proto."""
    shape = _field(2, _field(1, _varint(1, 1)))
    float_tensor = _field(2, _field(1, _varint(1, 1) + shape))
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Relu")
    graph = (
        _field(1, node)
        + _field(2, b"graph")
        + _field(11, _field(1, b"x") + float_tensor)
        + _field(12, _field(1, b"y") + float_tensor)
    )
    return _varint(1, 7) + _field(7, graph) + _field(8, _varint(2, opset))


def _varint(number: int, value: int) -> bytes:
    """A small integer field; ``value`` is below 128."""
    return bytes([number << 3, value])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data
