"""Optimization profiles: the shapes min, opt and max of each input that an engine must take."""

from typing import Any, Dict, List

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine.io_tensors import DTYPES

KEY = "tensorrt.profiles"
KINDS = ("min", "opt", "max")
Shapes = Dict[str, Dict[str, List[int]]]


class Input:
    """An input of the network: name, shape (-1 where it is open), type, and whether its values are a shape."""

    def __init__(self, name: str, shape: List[int], is_shape: bool, dtype: str = "F32") -> None:
        self.name, self.shape, self.is_shape, self.dtype = name, shape, is_shape, dtype

    def is_open(self) -> bool:
        return self.is_shape or -1 in self.shape


def inputs_of(network: Any) -> List[Input]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return [
        Input(tensor.name, list(tensor.shape), tensor.is_shape_tensor, DTYPES[tensor.dtype.name])
        for tensor in tensors
    ]


def wanted(asked: List[Shapes], inputs: List[Input], examples: Dict[str, List[int]]) -> List[Shapes]:
    """The profiles of a build: those asked for, checked against the network's inputs.

    Without any, a network with open dimensions gets one for the shapes of its example inputs alone. Raises
    DeviceError (bad_request).
    """
    if asked:
        return [_checked(profile, inputs) for profile in asked]
    if not any(network_input.is_open() for network_input in inputs):
        return []
    return [_checked({name: dict.fromkeys(KINDS, shape) for name, shape in examples.items()}, inputs)]


def _checked(profile: Shapes, inputs: List[Input]) -> Shapes:
    names = [network_input.name for network_input in inputs]
    unknown = sorted(set(profile) - set(names))
    missing = [one.name for one in inputs if one.is_open() and one.name not in profile]
    if unknown and missing:
        raise _bad("names {}, but the network's inputs are {}".format(unknown, names))
    if missing:
        raise _bad("must give min, opt and max of {}, whose shape is open".format(missing))
    for network_input in inputs:
        if network_input.name in profile:
            _check_shapes(network_input, profile[network_input.name])
    return {name: profile[name] for name in names if name in profile}


def _check_shapes(network_input: Input, shapes: Dict[str, List[int]]) -> None:
    if not set(KINDS) <= set(shapes):
        raise _bad("lacks min, opt or max of {!r}".format(network_input.name))
    ordered = zip(*(shapes[kind] for kind in KINDS))
    if len({len(shapes[kind]) for kind in KINDS}) > 1 or any(
        list(sizes) != sorted(sizes) for sizes in ordered
    ):
        raise _bad("needs min <= opt <= max of {!r}, and has {}".format(network_input.name, shapes))
    if not network_input.is_shape and not all(_fits(shapes[kind], network_input.shape) for kind in KINDS):
        raise _bad(
            "gives {!r} the shapes {}, and the network has {} (-1 is open)".format(
                network_input.name, shapes, network_input.shape
            )
        )


def _fits(shape: List[int], declared: List[int]) -> bool:
    return len(shape) == len(declared) and all(
        size == fixed or fixed == -1 for size, fixed in zip(shape, declared)
    )


def add(builder: Any, config: Any, profiles: List[Shapes], inputs: List[Input]) -> List[Any]:
    """Adds them to the build; returns TensorRT's profiles, the first of which serves calibration."""
    return [_add(builder, config, profile, inputs) for profile in profiles]


def _add(builder: Any, config: Any, profile: Shapes, inputs: List[Input]) -> Any:
    native = builder.create_optimization_profile()
    for network_input in inputs:
        if network_input.name in profile:
            shapes = [tuple(profile[network_input.name][kind]) for kind in KINDS]
            give = native.set_shape_input if network_input.is_shape else native.set_shape
            give(network_input.name, *shapes)
    if config.add_optimization_profile(native) < 0:
        raise _bad("is not one that TensorRT takes: {}".format(profile))
    return native


def tuned(profiles: List[Shapes], inputs: List[Input]) -> List[Input]:
    """The inputs with the shapes that the build is tuned for, and calibrated with: ``opt`` of the first profile."""
    first = profiles[0] if profiles else {}
    shapes = [list(first[one.name]["opt"]) if one.name in first else one.shape for one in inputs]
    return [Input(one.name, shape, one.is_shape, one.dtype) for one, shape in zip(inputs, shapes)]


def is_static(profiles: List[Shapes]) -> bool:
    """Whether every shape is one alone, as the DLA needs it."""
    shapes = [shape for profile in profiles for shape in profile.values()]
    return all(list(one["min"]) == list(one["opt"]) == list(one["max"]) for one in shapes)


def _bad(text: str) -> DeviceError:
    return DeviceError("{} {}.".format(KEY, text), errors.BAD_REQUEST)
