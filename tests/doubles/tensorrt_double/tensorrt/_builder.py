"""Builders: what a build accepts and refuses in this version, and what it calls back meanwhile."""

import hashlib
import os
import signal
import struct
import threading
import time

from tensorrt import _config, _extensions, _gpu, _native, _network, _plan, _settings, _values
from tensorrt._values import DeviceType, IHostMemory

WEAK_FLAGS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS",
              "PREFER_PRECISION_CONSTRAINTS")  # fmt: skip
PRECISION_NAMES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT8": "INT8"}
OUT_OF_MEMORY = "Requested amount of GPU memory ({} bytes) could not be allocated: out of memory"


class Refusal(Exception):
    """Why a build ends without an engine; it becomes a message for the logger."""


class Builder(_native.Native):
    _constructible = True

    def __init__(self, logger):
        _native.require(logger, _extensions.ILogger, "Builder")
        super().__init__()
        self._logger, self._max_batch_size, self._threads = _native.pointer_to(logger), 1, 1

    def _say(self, severity, text):
        _extensions.say(self._logger, severity, text)

    @property
    def logger(self):
        return _native.follow(self._logger)

    @property
    def num_DLA_cores(self):
        return _settings.dla_cores()

    @property
    def max_DLA_batch_size(self):
        return 4096 if _settings.dla_cores() else 1

    @property
    def platform_has_fast_fp16(self):
        return _settings.capability_number() >= (5, 3)

    @property
    def platform_has_fast_int8(self):
        return _settings.capability_number() >= (6, 1)

    @property
    def platform_has_tf32(self):
        return _settings.capability_number() >= (8, 0)

    @property
    def max_batch_size(self):
        return self._max_batch_size

    @max_batch_size.setter
    def max_batch_size(self, value):
        self._max_batch_size = value

    @property
    def max_threads(self):
        return self._threads

    @max_threads.setter
    def max_threads(self, value):
        self._threads = value

    def reset(self):
        self._max_batch_size = self._threads = 1

    def create_network(self, flags=0):
        _native.require(flags, int, "create_network")
        known = _values.NetworkDefinitionCreationFlag.__members__.values()
        if flags >> (max(member.value for member in known) + 1):
            self._say("ERROR", "Error Code 3: API Usage Error (unknown network creation flag)")
            return None
        return _network.INetworkDefinition._of(self, flags)

    def create_builder_config(self):
        return _config.IBuilderConfig._of(self)

    def create_optimization_profile(self):
        return _config.IOptimizationProfile._of()

    def is_network_supported(self, network, config):
        return not _reasons(network, config)

    def build_serialized_network(self, network, config):
        """A plan of the double, or None with the reason logged. Most of it happens in another thread."""
        _native.require(network, _network.INetworkDefinition, "build_serialized_network")
        _native.require(config, _config.IBuilderConfig, "build_serialized_network")
        outcome = []
        try:
            _check(network, config)
            if _wants_calibration(network, config):
                Calibration(network, config).run()
        except Refusal as exc:
            self._say("ERROR", str(exc))
            return None
        worker = threading.Thread(target=lambda: outcome.append(Build(network, config).run()))
        worker.start()
        worker.join()
        return outcome[0] if outcome else None

    def build_engine(self, network, config):
        from tensorrt import _engine

        plan = self.build_serialized_network(network, config)
        runtime = _engine.Runtime(self.logger)
        return None if plan is None else runtime.deserialize_cuda_engine(plan)

    build_engine_with_config = build_engine


def _check(network, config):
    reasons = _reasons(network, config)
    if reasons:
        raise Refusal(reasons[0])


def _reasons(network, config):
    """Everything that keeps the network from being built so."""
    rules = (_empty, _typing, _quantization, _types_of_this_gpu, _profiles, _dla, _compatibility)
    return [reason for rule in rules for reason in rule(network, config)]


def _empty(network, config):
    if not network._layers:
        yield "Error Code 4: Internal Error (Network must have at least one output)"


def _uses(network, dtype):
    tensors = any(tensor._dtype == dtype for tensor in network._tensors.values())
    wishes = [layer._precision for layer in network._layers if layer._precision]
    wishes += [wish for layer in network._layers for wish in layer._output_types.values()]
    weights = [weight.elem_type for weight in network._model.initializers.values()] if network._model else []
    stored = any(_network.DATA_TYPES.get(elem_type) == dtype for elem_type in weights)
    return tensors or stored or any(wish.name == dtype for wish in wishes)


def _has_nodes(network, *operators):
    return any(layer._node.op_type in operators for layer in network._layers)


def _is_explicit(network):
    return _has_nodes(network, _plan.Q, _plan.DQ)


def _typing(network, config):
    """Up to 10.x a weakly typed network needs the flag of each type in it; a strongly typed one bears none."""
    if network._is_strongly_typed():
        for flag in WEAK_FLAGS:
            if config._has(flag):
                yield (
                    "IBuilder::buildSerializedNetwork: Error Code 3: API Usage Error (Parameter check failed, "
                    f"condition: !config.getFlag(BuilderFlag::k{flag})"
                )
        return
    for dtype, flag in (("HALF", "FP16"), ("BF16", "BF16")):
        if _uses(network, dtype) and not config._has(flag):
            low = flag.lower()
            yield (
                f"Error Code 4: Internal Error ({low} precision has been set for a layer or layer output, but {low} "
                "is not configured in the builder)"
            )
    if _is_explicit(network) and not config._has("INT8"):
        yield "Error Code 4: Internal Error (int8 precision has been set for a layer, but int8 is not configured)"


def _quantization(network, config):
    if config._calibrator is not None and _is_explicit(network):
        yield "Error Code 4: Internal Error (a calibrator is set for a network with Q/DQ layers)"
    ranges = any(tensor._range for tensor in network._tensors.values())
    if config._has("INT8") and not (config._calibrator or ranges or _is_explicit(network)):
        yield (
            "Error Code 4: Internal Error (Calibration failure occurred with no scaling factors detected. There "
            "is no int8 calibrator and there are no dynamic ranges)"
        )
    if ranges and _is_explicit(network):
        yield "Error Code 4: Internal Error (dynamic ranges are set for a network with Q/DQ layers)"


def _types_of_this_gpu(network, config):
    if _uses(network, "BF16") and _settings.capability_number() < (8, 0):
        yield "Error Code 9: Internal Error (bf16 is not supported on this GPU)"


def _profiles(network, config):
    dynamic = {tensor._name: tensor._shape for tensor in network._inputs if -1 in tensor._shape}
    if dynamic and not config._profiles:
        yield "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile)"
    for number, profile in enumerate(config._profiles):
        for name in sorted(set(dynamic) - set(profile._shapes)):
            yield f"Error Code 4: API Usage Error (input {name}: profile {number} has no dimensions)"
        for tensor in network._inputs:
            shapes = profile._shapes.get(tensor._name, [])
            if not all(_fits(shape, tensor._shape) for shape in shapes):
                yield f"Error Code 4: API Usage Error (input {tensor._name}: profile {number} does not fit the network)"


def _fits(shape, wanted):
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted))


def _dla(network, config):
    """DLA takes fixed shapes, FP16 or INT8 without Q/DQ, its own operators, and one of its cores."""
    wanted = [layer for layer in network._layers if config.get_device_type(layer) == DeviceType.DLA]
    if not wanted:
        return
    if not 0 <= config.DLA_core < _settings.dla_cores():
        yield f"Error Code 3: API Usage Error (DLA core {config.DLA_core} is not on this platform)"
    elif _is_explicit(network) and not _settings.MAJOR >= 11:
        yield "Error Code 9: Internal Error (DLA does not support networks with Q/DQ layers)"
    elif not config._has_one_shape(network):
        yield "Error Code 9: Internal Error (DLA does not support dynamic shapes)"
    elif not (network._is_strongly_typed() or config._has("FP16", "INT8")):
        yield "Error Code 9: Internal Error (DLA needs FP16 or INT8)"
    elif not config._has("GPU_FALLBACK"):
        for layer in wanted:
            if not config.can_run_on_DLA(layer) and layer._node.op_type not in _plan.SHAPES_ONLY:
                yield f"Error Code 9: Internal Error ({layer._name}: not supported on DLA and GPU fallback is off)"


def _compatibility(network, config):
    if config._hardware_level() == "AMPERE_PLUS" and _settings.capability_number() < (8, 0):
        yield "Error Code 9: Internal Error (hardware compatibility needs an Ampere GPU or newer)"


def _wants_calibration(network, config):
    return config._calibrator is not None and config._has("INT8")


class Calibration:
    """The protocol of a calibrator: a cache that fits is taken, else batches are read until none is left."""

    def __init__(self, network, config):
        self.network, self.config = network, config
        self.calibrator = _native.follow(config._calibrator)

    def run(self):
        cache = _native.call_back(self.calibrator, "read_calibration_cache")
        if cache and bytes(cache).startswith(self._title()):
            return
        if cache:
            self.config._builder._say("WARNING", "The calibration cache is of another version or algorithm.")
        digests = self._read_batches()
        if not digests:
            raise Refusal("Error Code 1: Calibration failure: the calibrator gave no batch")
        _native.call_back(self.calibrator, "write_calibration_cache", memoryview(self._cache(digests)))

    def _title(self):
        algorithm = self.calibrator.get_algorithm().name
        name = {"ENTROPY_CALIBRATION_2": "EntropyCalibration2", "MINMAX_CALIBRATION": "MinMaxCalibration"}
        number = (
            "{}{}{:02d}".format(*_settings.NUMBER)
            if _settings.MAJOR < 10
            else "{}{:02d}{:02d}".format(*_settings.NUMBER)
        )
        return f"TRT-{number}-{name.get(algorithm, algorithm)}".encode()

    def _read_batches(self):
        """Digests of each input's bytes over all batches, which are read through the pointers given."""
        sizes = {tensor._name: self._batch_bytes(tensor) for tensor in self.network._inputs}
        digests = {name: hashlib.sha256() for name in sizes}
        found = 0
        while True:
            pointers = _native.call_back(self.calibrator, "get_batch", list(sizes))
            if not pointers:
                return digests if found else {}
            found += 1
            for (name, size), pointer in zip(sizes.items(), pointers):
                _native.require(pointer, int, "get_batch")
                data = _gpu.read(pointer, size)
                if data is None:
                    raise Refusal("Error Code 1: Cuda Runtime (an illegal memory access while calibrating)")
                digests[name].update(data)

    def _batch_bytes(self, tensor):
        profile = self.config._calibration_profile or (self.config._profiles or [None])[0]
        shape = tensor._shape
        if -1 in shape:
            shape = profile._shapes[tensor._name][1]
        count = _native.call_back(self.calibrator, "get_batch_size")
        if count is None or (shape and count != shape[0]):
            raise Refusal(f"Error Code 3: the calibrator's batch size {count} is not the profile's")
        size = _values.ITEM_BYTES[tensor._dtype]
        for length in shape:
            size *= length
        return size

    def _cache(self, digests):
        seed = hashlib.sha256(b"".join(digests[name].digest() for name in sorted(digests))).digest()
        lines = [self._title().decode()]
        for index, name in enumerate(sorted(self.network._tensors)):
            scale = (seed[index % 32] + 1) / 4096.0
            lines.append("{}: {}".format(name, struct.pack(">f", scale).hex()))
        return ("\n".join(lines) + "\n").encode()


class Build:
    """The part of a build that runs in a thread of its own, with the logger and the monitor called from there."""

    def __init__(self, network, config):
        self.network, self.config, self.builder = network, config, config._builder
        self.workspace_mib = config._workspace_mib()
        self.faults = _settings.faults()

    def run(self):
        _settings.note(f"{self.network._name} with {self.workspace_mib:g} MiB")
        try:
            self._suffer()
            fusion = _plan.Fusion(network=self.network, precision_of=self._precision, device_of=self._device)
            if not self._time_tactics(fusion.layers):
                return None
            header = dict(self._header(fusion.layers), types=fusion.types)
            return IHostMemory(_plan.pack(header, self.network._data))
        except Refusal as exc:
            self.builder._say("ERROR", str(exc))
            return None

    def _suffer(self):
        """The faults that the environment asks for."""
        if self.workspace_mib > float(self.faults.get("killed_above", "inf")):
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in self.faults:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.workspace_mib > float(self.faults.get("out_of_memory_above", "inf")):
            self.builder._say("WARNING", OUT_OF_MEMORY.format(int(self.workspace_mib) << 20))
            raise Refusal("Error Code 2: OutOfMemory (no further information)")
        if self.workspace_mib < float(self.faults.get("no_implementation_below", 0)):
            first = self.network._layers[0]._name
            raise Refusal(
                f"Error Code 10: Internal Error (Could not find any implementation for node {first} due to "
                "insufficient workspace)"
            )
        if "disk_full" in self.faults:
            raise Refusal("Error Code 1: a temporary file could not be written: No space left on device")

    def _time_tactics(self, layers):
        """Whether nobody cancelled. A layer in the timing cache is not timed again."""
        monitor, phase = _native.follow(self.config._monitor), "Building the double's engine"
        cache = self.config._cache
        wait_s = float(self.faults.get("slow_build", 0)) / max(1, len(layers))
        if monitor is not None:
            _native.call_back(monitor, "phase_start", phase, None, len(layers))
        for step, layer in enumerate(layers):
            known = cache is not None and layer["name"] in cache._entries
            self.builder._say(
                "VERBOSE", "{} {}".format("Cached timing of" if known else "Timing", layer["name"])
            )
            time.sleep(0 if known else wait_s)
            if cache is not None:
                cache._entries[layer["name"]] = 1
            if monitor is not None and _native.call_back(monitor, "step_complete", phase, step) is False:
                self.builder._say("WARNING", "The build was cancelled by the progress monitor.")
                _native.call_back(monitor, "phase_finish", phase)
                return False
        if monitor is not None:
            _native.call_back(monitor, "phase_finish", phase)
        return True

    def _device(self, layer):
        wanted = self.config.get_device_type(layer) == DeviceType.DLA
        runs = wanted and self.config.can_run_on_DLA(layer)
        if wanted and not runs:
            text = f"layer {layer._name} is not supported on DLA, falling back to GPU."
            self.builder._say("WARNING", "Default DLA is enabled but " + text)
        return "DLA" if runs else "GPU"

    def _precision(self, layer):
        """What the layer works in; with weak typing, a wish counts only where a constraint flag says so."""
        own = layer.get_output(0)._dtype if layer.num_outputs else "FLOAT"
        source = layer.get_input(0)._dtype if layer._inputs() else own
        natural = own if own in PRECISION_NAMES else source
        if self.network._is_strongly_typed():
            return PRECISION_NAMES.get(natural, "FP32")
        obeyed = self.config._has(
            "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "STRICT_TYPES"
        )
        if layer._precision is not None and obeyed:
            return PRECISION_NAMES.get(layer._precision.name, "FP32")
        if _wants_calibration(self.network, self.config) and layer._node.op_type in _plan.QUANTIZABLE:
            return "INT8"
        lowest = "FP16" if self.config._has("FP16") else "BF16" if self.config._has("BF16") else None
        return (
            lowest
            if lowest and natural in ("FLOAT", "HALF", "BF16")
            else PRECISION_NAMES.get(natural, "FP32")
        )

    def _header(self, layers):
        return {
            "version": _settings.VERSION,
            "version_compatible": self.config._has("VERSION_COMPATIBLE"),
            "without_lean_runtime": self.config._has("EXCLUDE_LEAN_RUNTIME"),
            "compute_capability": _settings.compute_capability(),
            "hardware_level": self.config._hardware_level(),
            "name": self.network._name,
            "verbosity": _verbosity(self.config.profiling_verbosity),
            "layers": layers,
            "tensors": self._tensors(),
            "shapes": {name: list(tensor._shape) for name, tensor in self.network._tensors.items()},
            "profiles": [profile._shapes for profile in self.config._profiles] or [{}],
            "dla_core": self.config.DLA_core,
            "uses_dla": any(layer["device"] == "DLA" for layer in layers),
            "tactic_sources": self.config._sources,
        }

    def _tensors(self):
        ends = [(tensor, True) for tensor in self.network._inputs]
        ends += [(tensor, False) for tensor in self.network._outputs]
        return [
            {"name": tensor._name, "dtype": tensor._dtype, "shape": list(tensor._shape), "input": is_input}
            for tensor, is_input in ends
        ]


def _verbosity(value):
    """One name for values that have several."""
    return {0: "LAYER_NAMES_ONLY", 1: "NONE", 2: "DETAILED"}[value.value]
