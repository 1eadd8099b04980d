"""Builds with the double of TensorRT that is on the path: reads a JSON object of cases from stdin, by name, and writes
for each whether there was a plan and what the log said. Written for this double: it takes names for granted.

A case has ``onnx``, and may have ``flags`` and ``network_flags`` (names), ``profile`` (min, opt, max of ``image``),
``calibrate`` (a batch's path), ``precision`` (of the first layer), ``dla`` (its core) and ``ampere``.
"""

import json
import sys

import tensorrt as trt


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, msg):
        if severity.name == "ERROR":
            self.errors.append(msg)


class Calibrator(getattr(trt, "IInt8EntropyCalibrator2", object)):
    """Has no batch to give: a build that comes so far fails for that."""

    def __init__(self):
        super().__init__()

    def get_batch_size(self):
        return 1

    def get_batch(self, names):
        return None

    def read_calibration_cache(self):
        return None

    def write_calibration_cache(self, cache):
        raise AssertionError("there was no batch")


def main():
    json.dump({name: tried(case) for name, case in json.load(sys.stdin).items()}, sys.stdout)


def tried(case):
    log = Log()
    try:
        plan, kept = build(case, log)
    except (AttributeError, TypeError, RuntimeError) as exc:
        return {"built": False, "raised": type(exc).__name__, "errors": [str(exc)]}
    return {"built": plan is not None, "raised": None, "errors": log.errors, "kept": len(kept)}


def build(case, log):
    builder = trt.Builder(log)
    network = builder.create_network(mask("NetworkDefinitionCreationFlag", case.get("network_flags", [])))
    parser, config = trt.OnnxParser(network, log), builder.create_builder_config()
    if not parser.parse_from_file(case["onnx"]):
        return None, []
    for flag in case.get("flags", []):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    kept = [adopt(case[key], builder, network, config) for key, adopt in STEPS.items() if key in case]
    return builder.build_serialized_network(network, config), kept


def mask(enum, names):
    return sum(1 << int(getattr(getattr(trt, enum), name)) for name in names)


def with_profile(shapes, builder, network, config):
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *shapes)
    config.add_optimization_profile(profile)
    return profile


def with_calibrator(_, builder, network, config):
    config.int8_calibrator = calibrator = Calibrator()
    return calibrator


def with_precision(name, builder, network, config):
    network.get_layer(0).precision = getattr(trt.DataType, name)


def on_dla(core, builder, network, config):
    config.default_device_type, config.DLA_core = trt.DeviceType.DLA, core


def for_ampere(_, builder, network, config):
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


STEPS = {
    "profile": with_profile,
    "calibrate": with_calibrator,
    "precision": with_precision,
    "dla": on_dla,
    "ampere": for_ampere,
}

main()
