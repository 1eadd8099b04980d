"""What a build is asked to do: profiles, the timing cache and the configuration, with what this version can set."""

import json

from tensorrt import _extensions, _native, _network, _settings, _values
from tensorrt._values import BuilderFlag, DeviceType, IHostMemory, TacticSource

DLA_OPERATORS = ("Conv", "ConvTranspose", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "MaxPool", "AveragePool",
                 "GlobalAveragePool", "Add", "Sub", "Mul", "Concat", "BatchNormalization")  # fmt: skip
CACHE_MAGIC = b"TENSORRT DOUBLE TIMING CACHE\n"
MIB = 1 << 20
ALL_MEMORY = 8192 * MIB


class IOptimizationProfile(_native.Native):
    @classmethod
    def _of(cls):
        return cls._make(_shapes={}, _shape_inputs={}, _extra=1.0)

    def set_shape(self, input, min, opt, max):
        shapes = [_values.sizes_of(shape) for shape in (min, opt, max)]
        same_length = len({len(shape) for shape in shapes}) == 1
        if not same_length or any(not low <= mid <= high for low, mid, high in zip(*shapes)):
            raise RuntimeError("Shape provided for max is inconsistent with other set shapes")
        self._shapes[input] = shapes

    def get_shape(self, input):
        return [_values.Dims(shape) for shape in self._shapes.get(input, [])]

    def set_shape_input(self, input, min, opt, max):
        self._shape_inputs[input] = [list(values) for values in (min, opt, max)]

    def get_shape_input(self, input):
        return self._shape_inputs.get(input, [])

    @property
    def extra_memory_target(self):
        return self._extra

    @extra_memory_target.setter
    def extra_memory_target(self, value):
        self._extra = value

    def __bool__(self):
        return True


class ITimingCache(_native.Native):
    """Timings of the double, by layer: they mean nothing but that they are there."""

    @classmethod
    def _of(cls, data):
        made = cls._make(_entries={}, _platform=_platform(), _valid=True)
        if data:
            made._read(data)
        return made

    def _read(self, data):
        try:
            if not data.startswith(CACHE_MAGIC):
                raise ValueError("the magic tag does not match")
            stored = json.loads(data[len(CACHE_MAGIC) :].decode())
            self._platform, self._entries = stored["platform"], stored["entries"]
        except ValueError:
            self._valid = False

    def serialize(self):
        stored = {"platform": self._platform, "entries": self._entries}
        return IHostMemory(CACHE_MAGIC + json.dumps(stored, sort_keys=True).encode())

    def combine(self, input_cache, ignore_mismatch):
        if input_cache._platform != self._platform and not ignore_mismatch:
            return False
        self._entries.update(input_cache._entries)
        return True

    def reset(self):
        self._entries = {}
        return True


def _platform():
    return [_settings.VERSION, _settings.compute_capability()]


def _bits(numbers):
    return sum(1 << number for number in set(numbers))


def _field(name, otherwise, kind=None):
    """A property of the builder's configuration that is only kept."""
    hidden = "_" + name

    def get(self):
        return self._fields.get(hidden, otherwise)

    def put(self, value):
        if kind is not None:
            _native.require(value, kind, name)
        self._fields[hidden] = value

    return property(get, put)


class IBuilderConfig(_native.Native):
    @classmethod
    def _of(cls, builder):
        made = cls._make(_builder=builder)
        made.reset()
        return made

    def reset(self):
        self._fields, self._pools, self._devices, self._profiles = {}, {}, {}, []
        self._cache = self._calibrator = self._monitor = self._calibration_profile = None
        self._sources = _bits(member.value for member in TacticSource.__members__.values())
        self._flags = 1 << BuilderFlag.TF32.value

    avg_timing_iterations = _field("avg_timing_iterations", 1, int)
    min_timing_iterations = _field("min_timing_iterations", 1, int)
    max_aux_streams = _field("max_aux_streams", -1, int)
    max_workspace_size = _field("max_workspace_size", 0, int)
    profile_stream = _field("profile_stream", 0, int)
    DLA_core = _field("DLA_core", -1, int)
    default_device_type = _field("default_device_type", DeviceType.GPU, DeviceType)
    engine_capability = _field("engine_capability", _values.EngineCapability.STANDARD)
    hardware_compatibility_level = _field(
        "hardware_compatibility_level",
        _values.HardwareCompatibilityLevel and _values.HardwareCompatibilityLevel.NONE,
        _values.HardwareCompatibilityLevel,
    )
    profiling_verbosity = _field(
        "profiling_verbosity", _values.ProfilingVerbosity(0), _values.ProfilingVerbosity
    )
    max_num_tactics = _field("max_num_tactics", -1, int)
    plugins_to_serialize = _field("plugins_to_serialize", [])
    quantization_flags = _field("quantization_flags", 0, int)

    def _hardware_level(self):
        level = self._fields.get("_hardware_compatibility_level")
        return level.name if level is not None else "NONE"

    @property
    def builder_optimization_level(self):
        return self._fields.get("level", 3)

    @builder_optimization_level.setter
    def builder_optimization_level(self, value):
        _native.require(value, int, "builder_optimization_level")
        if 0 <= value <= 5:
            self._fields["level"] = value
        else:
            self._builder._say("ERROR", "Error Code 3: API Usage Error (the level is not within 0 to 5)")

    @property
    def flags(self):
        return self._flags

    @flags.setter
    def flags(self, value):
        self._flags = value

    def set_flag(self, flag):
        _native.require(flag, BuilderFlag, "set_flag")
        self._flags |= 1 << flag.value

    def clear_flag(self, flag):
        _native.require(flag, BuilderFlag, "clear_flag")
        self._flags &= ~(1 << flag.value)

    def get_flag(self, flag):
        _native.require(flag, BuilderFlag, "get_flag")
        return bool(self._flags >> flag.value & 1)

    def _has(self, *names):
        """Whether any of the flags is set; one that this version lacks is not."""
        known = [BuilderFlag.__members__[name] for name in names if name in BuilderFlag.__members__]
        return any(self.get_flag(flag) for flag in known)

    def set_quantization_flag(self, flag):
        self.quantization_flags |= 1 << int(flag)

    def clear_quantization_flag(self, flag):
        self.quantization_flags &= ~(1 << int(flag))

    def get_quantization_flag(self, flag):
        return bool(self.quantization_flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool, pool_size):
        _native.require(pool, _values.MemoryPoolType, "set_memory_pool_limit")
        _native.require(pool_size, int, "set_memory_pool_limit")
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool):
        _native.require(pool, _values.MemoryPoolType, "get_memory_pool_limit")
        return self._pools.get(pool.name, ALL_MEMORY)

    def _workspace_mib(self):
        return self._pools.get("WORKSPACE", self._fields.get("_max_workspace_size", ALL_MEMORY)) / MIB

    def add_optimization_profile(self, profile):
        _native.require(profile, IOptimizationProfile, "add_optimization_profile")
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def set_calibration_profile(self, profile):
        self._calibration_profile = profile
        return True

    def get_calibration_profile(self):
        return self._calibration_profile

    @property
    def int8_calibrator(self):
        return _native.follow(self._calibrator)

    @int8_calibrator.setter
    def int8_calibrator(self, value):
        _native.require(value, _extensions.IInt8Calibrator, "int8_calibrator")
        self._calibrator = _native.pointer_to(value)

    @property
    def progress_monitor(self):
        return _native.follow(self._monitor)

    @progress_monitor.setter
    def progress_monitor(self, value):
        _native.require(value, _extensions.IProgressMonitor, "progress_monitor")
        self._monitor = _native.pointer_to(value)

    def create_timing_cache(self, serialized_timing_cache):
        cache = ITimingCache._of(bytes(memoryview(serialized_timing_cache)))
        if not cache._valid:
            self._builder._say(
                "ERROR", "Error Code 3: API Usage Error (the timing cache cannot be deserialized)"
            )
        return cache if cache._valid else None

    def set_timing_cache(self, cache, ignore_mismatch):
        _native.require(cache, ITimingCache, "set_timing_cache")
        if cache._platform != _platform() and not ignore_mismatch:
            self._builder._say(
                "WARNING", "The timing cache was made by another version or on another device."
            )
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def set_tactic_sources(self, tactic_sources):
        _native.require(tactic_sources, int, "set_tactic_sources")
        if tactic_sources & ~_bits(member.value for member in TacticSource.__members__.values()):
            return False
        self._sources = tactic_sources
        return True

    def get_tactic_sources(self):
        return self._sources

    def set_device_type(self, layer, device_type):
        _native.require(layer, _network.ILayer, "set_device_type")
        _native.require(device_type, DeviceType, "set_device_type")
        self._devices[layer._node.index] = device_type

    def get_device_type(self, layer):
        return self._devices.get(layer._node.index, self.default_device_type)

    def is_device_type_set(self, layer):
        return layer._node.index in self._devices

    def reset_device_type(self, layer):
        self._devices.pop(layer._node.index, None)

    def can_run_on_DLA(self, layer):
        _native.require(layer, _network.ILayer, "can_run_on_DLA")
        fixed = self._has_one_shape(layer._network)
        return bool(_settings.dla_cores()) and fixed and layer._node.op_type in DLA_OPERATORS

    def _has_one_shape(self, network):
        """An open dimension does no harm where min, opt and max of every profile are the same."""
        opened = [tensor._name for tensor in network._inputs if -1 in tensor._shape]
        ranges = [profile._shapes.get(name, []) for profile in self._profiles for name in opened]
        return not opened or (
            bool(ranges) and all(len({tuple(shape) for shape in one}) == 1 for one in ranges)
        )
