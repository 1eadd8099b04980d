"""An engine's inputs and outputs, and how a context is given them, in the three generations of TensorRT's API.

8.0 to 8.4 know bindings by index, and a set of them for each optimization profile; 10 and later know tensors by
name; 8.5 and 8.6 know both, and are used by name.
"""

import functools
from typing import Any, Callable, Dict, List, Sequence, Tuple

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import bindings

#: TensorRT's types by name, as safetensors calls them.
DTYPES = {
    "FLOAT": "F32",
    "HALF": "F16",
    "BF16": "BF16",
    "FP8": "F8_E4M3",
    "INT8": "I8",
    "UINT8": "U8",
    "BOOL": "BOOL",
    "INT32": "I32",
    "INT64": "I64",
}
# What a version beyond those that are known would lack.
INTERFACE = "interface for inputs and outputs that Jetway knows"
NEWER = "Use a newer Jetway."
Shape = Tuple[int, ...]


class IoTensor:
    """An input or output of an engine; ``shape`` has -1 where it is open.

    ``index`` is its binding in the first profile, of ``per_profile`` bindings in each; without a meaning where the
    API knows names.
    """

    def __init__(self, name: str, is_input: bool, dtype: Any, shape: Any, location: Any) -> None:
        self.name = name
        self.is_input = bool(is_input)
        self.dtype = _dtype(name, dtype)
        self.shape = tuple(shape)
        _check_location(name, location)
        self.index = 0
        self.per_profile = 0

    def binding(self, profile: int) -> int:
        return self.index + profile * self.per_profile

    def is_open(self) -> bool:
        return -1 in self.shape


def _check_location(name: str, location: Any) -> None:
    if location.name == "HOST":
        raise DeviceError(
            "The values of the engine's tensor {!r} are a shape, which TensorRT wants on the host. Export the network "
            "with sizes that are fixed, or taken from the shapes of its inputs.".format(name),
            errors.MISMATCH,
        )


def _dtype(name: str, native: Any) -> str:
    if native.name not in DTYPES:
        raise DeviceError(
            "The engine's tensor {!r} is {}, which cannot be handed over. Give the network inputs and outputs of "
            "float32.".format(name, native.name),
            errors.MISMATCH,
        )
    return DTYPES[native.name]


def io_tensors(engine: Any) -> List[IoTensor]:
    """Inputs and outputs in the engine's order."""
    if bindings.has(engine, "num_io_tensors") and bindings.has(engine, "get_tensor_name"):
        return [_named(engine, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
    elif bindings.has(engine, "num_bindings"):
        per_profile = engine.num_bindings // max(1, engine.num_optimization_profiles)
        return [_indexed(engine, index, per_profile) for index in range(per_profile)]
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def _named(engine: Any, name: str) -> IoTensor:
    if (
        bindings.has(engine, "get_tensor_mode")
        and bindings.has(engine, "get_tensor_dtype")
        and bindings.has(engine, "get_tensor_shape")
        and bindings.has(engine, "get_tensor_location")
    ):
        is_input = engine.get_tensor_mode(name) == bindings.member("TensorIOMode", "INPUT")
        dtype, shape = engine.get_tensor_dtype(name), engine.get_tensor_shape(name)
        return IoTensor(name, is_input, dtype, shape, engine.get_tensor_location(name))
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def _indexed(engine: Any, index: int, per_profile: int) -> IoTensor:
    if (
        bindings.has(engine, "get_binding_name")
        and bindings.has(engine, "binding_is_input")
        and bindings.has(engine, "get_binding_dtype")
        and bindings.has(engine, "get_binding_shape")
        and bindings.has(engine, "get_location")
    ):
        name, is_input = engine.get_binding_name(index), engine.binding_is_input(index)
        dtype, shape = engine.get_binding_dtype(index), engine.get_binding_shape(index)
        found = IoTensor(name, is_input, dtype, shape, engine.get_location(index))
        found.index, found.per_profile = index, per_profile
        return found
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def profile_shapes(engine: Any, tensor: IoTensor, profile: int) -> List[Shape]:
    """Shapes min, opt and max of an input."""
    if bindings.has(engine, "get_tensor_profile_shape"):
        return _shapes(engine.get_tensor_profile_shape(tensor.name, profile))
    elif bindings.has(engine, "get_profile_shape"):
        return _shapes(engine.get_profile_shape(profile, tensor.binding(profile)))
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def _shapes(natives: Sequence[Any]) -> List[Shape]:
    return [tuple(native) for native in natives]


def set_shape(context: Any, tensor: IoTensor, profile: int, shape: Shape) -> bool:
    """Tells the context the shape of an open input; False where the profile does not allow it."""
    if bindings.has(context, "set_input_shape"):
        return bool(context.set_input_shape(tensor.name, shape))
    elif bindings.has(context, "set_binding_shape"):
        return bool(context.set_binding_shape(tensor.binding(profile), shape))
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def shape_of(context: Any, tensor: IoTensor, profile: int) -> Shape:
    """The shape of a tensor, once those of the inputs are set."""
    if bindings.has(context, "get_tensor_shape"):
        return tuple(context.get_tensor_shape(tensor.name))
    elif bindings.has(context, "get_binding_shape"):
        return tuple(context.get_binding_shape(tensor.binding(profile)))
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def enqueue_on(
    context: Any, tensors: Sequence[IoTensor], profile: int, addresses: Dict[str, int]
) -> Callable[[int], Callable[[], bool]]:
    """Gives the context its memory. What comes back makes, for a stream's handle, the call that enqueues."""
    if bindings.has(context, "execute_async_v3") and bindings.has(context, "set_tensor_address"):
        for tensor in tensors:
            context.set_tensor_address(tensor.name, addresses[tensor.name])
        return lambda stream: functools.partial(context.execute_async_v3, stream)
    elif bindings.has(context, "execute_async_v2"):
        pointers = [0] * (len(tensors) * max(1, context.engine.num_optimization_profiles))
        for tensor in tensors:
            pointers[tensor.binding(profile)] = addresses[tensor.name]
        return lambda stream: functools.partial(context.execute_async_v2, pointers, stream)
    raise bindings.absent(INTERFACE, "tensorrt", NEWER)


def device_memory_bytes(engine: Any) -> int:
    """What one context takes for its activations."""
    if bindings.has(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    elif bindings.has(engine, "device_memory_size"):
        return int(engine.device_memory_size)
    return 0
