"""Engines and their execution, in the three generations of the API: by index (to 8.6), by name (from 8.5)."""

import json
import sys
import time
import traceback

from tensorrt import _compute, _extensions, _gpu, _native, _plan, _settings, _values
from tensorrt._values import DataType, Dims, IHostMemory, TensorFormat, TensorIOMode, TensorLocation

LINEAR = "Row major linear FP32 format (kLINEAR)"


class Runtime(_native.Native):
    _constructible = True

    def __init__(self, logger):
        _native.require(logger, _extensions.ILogger, "Runtime")
        super().__init__()
        self._logger, self._dla_core, self._host_code, self._threads = (
            _native.pointer_to(logger),
            -1,
            False,
            1,
        )

    @property
    def logger(self):
        return _native.follow(self._logger)

    @property
    def num_DLA_cores(self):
        return _settings.dla_cores()

    @property
    def DLA_core(self):
        return self._dla_core

    @DLA_core.setter
    def DLA_core(self, value):
        _native.require(value, int, "DLA_core")
        self._dla_core = value

    @property
    def engine_host_code_allowed(self):
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value):
        self._host_code = bool(value)

    @property
    def max_threads(self):
        return self._threads

    @max_threads.setter
    def max_threads(self, value):
        self._threads = value

    def deserialize_cuda_engine(self, serialized_engine):
        """The engine, or None with the reason logged when the plan is corrupt or made for another place."""
        plan = bytes(memoryview(serialized_engine))
        try:
            header, model = _plan.unpack(plan)
            self._check(header)
        except ValueError as exc:
            text = f"Error Code 1: Serialization (Serialization assertion failed: {exc})"
            _extensions.say(self._logger, "ERROR", text)
            return None
        return ICudaEngine._of(self, plan, header, _compute.Network(model))

    def _check(self, header):
        if "cannot_deserialize" in _settings.faults():
            raise ValueError("the environment asks for this fault")
        if header["version"] != _settings.VERSION and not header["version_compatible"]:
            raise ValueError(
                "the engine plan file is not compatible with this version of TensorRT, expecting library version "
                "{} got {}".format(_settings.VERSION, header["version"])
            )
        if header["version_compatible"] and not (header["without_lean_runtime"] or self._host_code):
            raise ValueError("the plan holds host code: set engine_host_code_allowed")
        if not self._fits_gpu(header):
            raise ValueError("the plan was generated on an incompatible device")
        if header["uses_dla"] and not 0 <= self._dla_core < _settings.dla_cores():
            raise ValueError(f"the plan runs on DLA and DLA_core is {self._dla_core}")

    def _fits_gpu(self, header):
        if header["hardware_level"] == "AMPERE_PLUS":
            return _settings.capability_number() >= (8, 0)
        return header["compute_capability"] == _settings.compute_capability()


def _constant(name):
    return property(lambda self: self._header[name])


class ICudaEngine(_native.Native):
    @classmethod
    def _of(cls, runtime, plan, header, network):
        made = cls._make(
            _runtime=runtime, _plan=plan, _header=header, _network=network, _profiles_in_use=set()
        )
        made._tensors = {tensor["name"]: tensor for tensor in header["tensors"]}
        return made

    def _say(self, severity, text):
        _extensions.say(self._runtime._logger, severity, text)

    name = _constant("name")
    tactic_sources = _constant("tactic_sources")

    @property
    def num_layers(self):
        return len(self._header["layers"])

    @property
    def num_optimization_profiles(self):
        return len(self._header["profiles"])

    @property
    def has_implicit_batch_dimension(self):
        return False

    @property
    def max_batch_size(self):
        return 1

    @property
    def refittable(self):
        return False

    @property
    def num_aux_streams(self):
        return 0

    @property
    def device_memory_size(self):
        return 1 << 20

    @property
    def device_memory_size_v2(self):
        return 1 << 20

    @property
    def engine_capability(self):
        return _values.EngineCapability.STANDARD

    @property
    def profiling_verbosity(self):
        return getattr(_values.ProfilingVerbosity, self._header["verbosity"])

    @property
    def hardware_compatibility_level(self):
        return getattr(_values.HardwareCompatibilityLevel, self._header["hardware_level"])

    def serialize(self):
        return IHostMemory(self._plan)

    def create_engine_inspector(self):
        return EngineInspector._make(_engine=self, _context=None)

    if _settings.MAJOR < 10:

        def create_execution_context(self):
            return IExecutionContext._of(self)

    else:

        def create_execution_context(self, strategy=None):
            return IExecutionContext._of(self)

    def _is_dynamic(self):
        return any(-1 in tensor["shape"] for tensor in self._tensors.values() if tensor["input"])

    # By name

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    def get_tensor_name(self, index):
        return self._header["tensors"][index]["name"]

    def _tensor(self, name):
        _native.require(name, str, "get_tensor")
        if name not in self._tensors:
            self._say("ERROR", f"Error Code 3: API Usage Error (Given invalid tensor name: {name})")
        return self._tensors.get(name)

    def get_tensor_mode(self, name):
        tensor = self._tensor(name)
        return (
            TensorIOMode.NONE
            if not tensor
            else TensorIOMode.INPUT
            if tensor["input"]
            else TensorIOMode.OUTPUT
        )

    def get_tensor_shape(self, name):
        tensor = self._tensor(name)
        return Dims(tensor["shape"] if tensor else ())

    def get_tensor_dtype(self, name):
        tensor = self._tensor(name)
        return getattr(DataType, tensor["dtype"]) if tensor else DataType.FLOAT

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_format(self, name, profile_index=0):
        return TensorFormat.LINEAR

    def get_tensor_format_desc(self, name, profile_index=0):
        return LINEAR

    def get_tensor_bytes_per_component(self, name, profile_index=0):
        return _values.ITEM_BYTES[self._tensor(name)["dtype"]]

    def get_tensor_components_per_element(self, name, profile_index=0):
        return 1

    def get_tensor_vectorized_dim(self, name, profile_index=0):
        return -1

    def is_shape_inference_io(self, name):
        return False

    def get_tensor_profile_shape(self, name, profile_index):
        _native.require(name, str, "get_tensor_profile_shape")
        _native.require(profile_index, int, "get_tensor_profile_shape")
        return [Dims(shape) for shape in self._profile_shapes(name, profile_index)]

    def _profile_shapes(self, name, index):
        return self._header["profiles"][index].get(name) or [self._tensors[name]["shape"]] * 3

    def get_tensor_profile_values(self, name, profile_index):
        """The binding's keyword names are swapped, so it is called by position: profile, then name."""
        _native.require(name, int, "get_tensor_profile_values")
        _native.require(profile_index, str, "get_tensor_profile_values")
        return []

    # By index: each profile has bindings of its own

    @property
    def num_bindings(self):
        return len(self._tensors) * self.num_optimization_profiles

    def _binding(self, which):
        index = self.get_binding_index(which) if isinstance(which, str) else which
        if not 0 <= index < self.num_bindings:
            raise IndexError("Out of bounds")
        return self._header["tensors"][index % len(self._tensors)]

    def get_binding_name(self, index):
        profile = index // len(self._tensors)
        return self._binding(index)["name"] + (f" [profile {profile}]" if profile else "")

    def get_binding_index(self, name):
        names = [self.get_binding_name(index) for index in range(self.num_bindings)]
        return names.index(name) if name in names else -1

    def binding_is_input(self, index):
        return self._binding(index)["input"]

    def get_binding_shape(self, index):
        return Dims(self._binding(index)["shape"])

    def get_binding_dtype(self, index):
        return getattr(DataType, self._binding(index)["dtype"])

    def get_binding_format(self, index):
        return TensorFormat.LINEAR

    def get_binding_format_desc(self, index):
        return LINEAR

    def get_binding_bytes_per_component(self, index):
        return _values.ITEM_BYTES[self._binding(index)["dtype"]]

    def get_binding_components_per_element(self, index):
        return 1

    def get_binding_vectorized_dim(self, index):
        return -1

    def get_location(self, index):
        return TensorLocation.DEVICE

    def is_shape_binding(self, binding):
        return False

    def is_execution_binding(self, binding):
        return True

    def get_profile_shape(self, profile_index, binding):
        return [Dims(shape) for shape in self._profile_shapes(self._binding(binding)["name"], profile_index)]


class EngineInspector(_native.Native):
    @property
    def execution_context(self):
        return self._context

    @execution_context.setter
    def execution_context(self, value):
        _native.require(value, IExecutionContext, "execution_context")
        self._context = value

    def get_engine_information(self, format):
        return self._written(_plan.information(self._engine._header), format)

    def get_layer_information(self, layer_index, format):
        header = self._engine._header
        layer = header["layers"][layer_index]
        detailed = header["verbosity"] == "DETAILED"
        return self._written(_plan.layer_information(header, layer) if detailed else layer["name"], format)

    @staticmethod
    def _written(facts, format):
        _native.require(format, _values.LayerInformationFormat, "get_engine_information")
        return json.dumps(facts, indent=1) if format.name == "JSON" else str(facts)


class IExecutionContext(_native.Native):
    @classmethod
    def _of(cls, engine):
        made = cls._make(
            _engine=engine, _shapes={}, _addresses={}, _works={}, _profiler=None, _emits=True, _name="", _ms=None,
            _stream=None, _fields={},
        )  # fmt: skip
        made._profile = -1 if made._is_taken(0) else 0
        engine._profiles_in_use.add(made._profile)
        return made

    def _is_taken(self, index):
        """In 8.x a profile of dynamic shapes serves one context at a time."""
        return _settings.MAJOR < 10 and self._engine._is_dynamic() and index in self._engine._profiles_in_use

    def __del__(self):
        self._engine._profiles_in_use.discard(self._profile)

    engine = property(lambda self: self._engine)

    @property
    def name(self):
        return self._name

    @name.setter
    def name(self, value):
        self._name = value

    @property
    def profiler(self):
        return _native.follow(self._profiler)

    @profiler.setter
    def profiler(self, value):
        _native.require(value, _extensions.IProfiler, "profiler")
        self._profiler = _native.pointer_to(value)

    @property
    def enqueue_emits_profile(self):
        return self._emits

    @enqueue_emits_profile.setter
    def enqueue_emits_profile(self, value):
        _native.require(value, bool, "enqueue_emits_profile")
        self._emits = value

    @property
    def nvtx_verbosity(self):
        return self._fields.get("nvtx", _values.ProfilingVerbosity(0))

    @nvtx_verbosity.setter
    def nvtx_verbosity(self, value):
        self._fields["nvtx"] = value

    @property
    def persistent_cache_limit(self):
        return self._fields.get("persistent", 0)

    @persistent_cache_limit.setter
    def persistent_cache_limit(self, value):
        self._fields["persistent"] = value

    @property
    def active_optimization_profile(self):
        return self._profile

    @active_optimization_profile.setter
    def active_optimization_profile(self, value):
        if not self.set_optimization_profile_async(value, 0):
            raise RuntimeError("Error in set optimization profile.")

    def set_optimization_profile_async(self, profile_index, stream_handle):
        _native.require(profile_index, int, "set_optimization_profile_async")
        _native.require(stream_handle, int, "set_optimization_profile_async")
        if profile_index == self._profile:
            return True
        if not 0 <= profile_index < self._engine.num_optimization_profiles or self._is_taken(profile_index):
            return self._refuse(f"optimization profile {profile_index} cannot be used")
        self._engine._profiles_in_use.discard(self._profile)
        self._engine._profiles_in_use.add(profile_index)
        self._profile, self._shapes = profile_index, {}
        return True

    def _refuse(self, text):
        self._engine._say("ERROR", f"Error Code 3: API Usage Error ({text})")
        return False

    # Shapes

    def _set_shape(self, tensor, shape):
        sizes = list(_values.sizes_of(shape))
        if tensor is None or not tensor["input"] or self._profile < 0:
            return self._refuse("no shape can be set here")
        low, _, high = self._engine._profile_shapes(tensor["name"], self._profile)
        fits = len(sizes) == len(low) and all(a <= size <= b for a, size, b in zip(low, sizes, high))
        if not fits:
            return self._refuse(
                "shape {} of {} is not within {} and {}".format(sizes, tensor["name"], low, high)
            )
        self._shapes[tensor["name"]] = sizes
        return True

    def _shape(self, tensor):
        """The current shape, with -1 where it is not known yet."""
        if -1 not in tensor["shape"]:
            return tensor["shape"]
        if tensor["input"]:
            return self._shapes.get(tensor["name"], tensor["shape"])
        return self._output_shape(tensor)

    def _inputs(self):
        return [tensor for tensor in self._engine._tensors.values() if tensor["input"]]

    def _output_shape(self, tensor):
        model, sizes = self._engine._network.model, {}
        for value in model.inputs:
            sizes.update(zip(value.dims, self._shape(self._engine._tensors[value.name])))
        dims = next(value.dims for value in model.outputs if value.name == tensor["name"])
        shape = [size if isinstance(size, int) else sizes.get(size, -1) for size in dims]
        if -1 in shape and self._shapes_are_set():
            return self._tried_shape(tensor)
        return shape

    def _tried_shape(self, tensor):
        """The shape of an output whose sizes have no name, found by running on zeros."""
        zeros = {}
        for each in self._inputs():
            shape = self._shape(each)
            zeros[each["name"]] = (shape, bytes(_bytes_of(shape, each["dtype"])))
        wanted = {tensor["name"]: (tensor["dtype"], [abs(size) for size in tensor["shape"]])}
        return list(self._engine._network.run(zeros, wanted)[tensor["name"]][0])

    def _shapes_are_set(self):
        return self._profile >= 0 and all(-1 not in self._shape(tensor) for tensor in self._inputs())

    @property
    def all_binding_shapes_specified(self):
        return self._shapes_are_set()

    @property
    def all_shape_inputs_specified(self):
        return True

    def set_binding_shape(self, binding, shape):
        _native.require(binding, int, "set_binding_shape")
        if binding // len(self._engine._tensors) != self._profile:
            return self._refuse(f"binding {binding} is not of the active profile")
        return self._set_shape(self._engine._binding(binding), shape)

    def get_binding_shape(self, binding):
        return Dims(self._shape(self._engine._binding(binding)))

    def set_input_shape(self, name, shape):
        _native.require(name, str, "set_input_shape")
        return self._set_shape(self._engine._tensor(name), shape)

    def get_tensor_shape(self, name):
        tensor = self._engine._tensor(name)
        return Dims(self._shape(tensor) if tensor else ())

    def get_tensor_strides(self, name):
        strides, step = [], 1
        for size in reversed(self._shape(self._engine._tensor(name))):
            strides.insert(0, step)
            step *= size
        return Dims(strides)

    def infer_shapes(self):
        return [tensor["name"] for tensor in self._inputs() if -1 in self._shape(tensor)]

    def get_max_output_size(self, name):
        tensor = self._engine._tensor(name)
        return _bytes_of(self._shape(tensor), tensor["dtype"])

    # Execution

    def set_tensor_address(self, name, memory):
        _native.require(memory, int, "set_tensor_address")
        if self._engine._tensor(name) is None:
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name):
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle):
        _native.require(stream_handle, int, "execute_async_v3")
        missing = [name for name in self._engine._tensors if not self._addresses.get(name)]
        if missing:
            return self._refuse("no address is set for {}".format(", ".join(missing)))
        return self._launch(self._addresses, stream_handle)

    def execute_async_v2(self, bindings, stream_handle, input_consumed=None):
        _native.require(stream_handle, int, "execute_async_v2")
        return self._launch(self._addresses_of(bindings), stream_handle)

    def execute_v2(self, bindings):
        """On the default stream, and waits for it."""
        return self._launch(self._addresses_of(bindings), 0) and _gpu.synchronize(None)

    def _addresses_of(self, bindings):
        for pointer in bindings:
            _native.require(pointer, int, "execute_v2")
        names = list(self._engine._tensors)
        first = len(names) * max(0, self._profile) if _settings.MAJOR < 10 else 0
        return dict(zip(names, bindings[first : first + len(names)]))

    def _launch(self, addresses, stream):
        if "execute_fails" in _settings.faults():
            return self._refuse("the environment asks for this fault")
        if not self._shapes_are_set():
            return self._refuse("not all dimensions of the inputs are set")
        if len(addresses) != len(self._engine._tensors):
            return self._refuse("there are fewer bindings than the engine has")
        self._stream = stream or None
        if not _gpu.enqueue(self._stream, self._work(dict(addresses))):
            return False
        if self._profiler is not None and self._emits and not _gpu.is_capturing(self._stream):
            return self._emit_profile()
        return True

    def _work(self, addresses):
        """The kernel, as a callback for the stream; kept, as a graph may call it long after."""
        shapes = {name: tuple(self._shape(tensor)) for name, tensor in self._engine._tensors.items()}
        key = (tuple(sorted(addresses.items())), tuple(sorted(shapes.items())))
        if key not in self._works:
            self._works[key] = _gpu.WORK(lambda _: self._guarded(addresses, shapes))
        return self._works[key]

    def _guarded(self, addresses, shapes):
        try:
            return self._run(addresses, shapes)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return _gpu.LAUNCH_FAILURE

    def _run(self, addresses, shapes):
        start = time.perf_counter()
        inputs, outputs = {}, {}
        for name, tensor in self._engine._tensors.items():
            if tensor["input"]:
                data = _gpu.read(addresses[name], _bytes_of(shapes[name], tensor["dtype"]))
                if data is None:
                    return _gpu.ILLEGAL_ADDRESS
                inputs[name] = (shapes[name], data)
            else:
                outputs[name] = (tensor["dtype"], shapes[name])
        for name, (_, data) in self._engine._network.run(inputs, outputs).items():
            if not _gpu.write(addresses[name], data):
                return _gpu.ILLEGAL_ADDRESS
        time.sleep(max(0, _settings.kernel_ms() / 1000 - (time.perf_counter() - start)))
        self._ms = (time.perf_counter() - start) * 1000
        return 0

    def _emit_profile(self):
        """The time of the last execution, shared out evenly: the double has no times of layers."""
        if not _gpu.synchronize(self._stream) or self._ms is None:
            return False
        layers, profiler = self._engine._header["layers"], self.profiler
        for layer in layers:
            _native.call_back(profiler, "report_layer_time", layer["name"], self._ms / len(layers))
        return True

    def report_to_profiler(self):
        if self._profiler is None or self._emits:
            return self._refuse("report_to_profiler needs a profiler and enqueue_emits_profile off")
        return self._emit_profile()


def _bytes_of(shape, dtype):
    size = _values.ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return size
