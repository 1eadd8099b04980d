"""Classes that a user extends: loggers, profilers, monitors and calibrators. Their base __init__ must be called."""

import sys

from tensorrt import _native, _values
from tensorrt._values import Severity


class _Extension(_native.Native):
    _must_call_init = True
    _constructible = True


class ILogger(_Extension):
    def log(self, severity, msg):
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


ILogger.Severity = Severity
for _name, _member in Severity.__members__.items():
    setattr(ILogger, _name, _member)


class Logger(ILogger):
    """Writes to stderr what is at least as severe as ``min_severity``."""

    def __init__(self, min_severity=Severity.WARNING):
        _native.require(min_severity, Severity, "Logger")
        super().__init__()
        self._min_severity = min_severity

    Severity = Severity

    @property
    def min_severity(self):
        return self._min_severity

    @min_severity.setter
    def min_severity(self, value):
        _native.require(value, Severity, "min_severity")
        self._min_severity = value

    def log(self, severity, msg):
        _native.require(severity, Severity, "log")
        if int(severity) <= int(self._min_severity):
            sys.stderr.write(f"[TRT DOUBLE] [{severity.name[0]}] {msg}\n")


for _name, _member in Severity.__members__.items():
    setattr(Logger, _name, _member)


def say(pointer, severity, text):
    """Logs as TensorRT does: a message for the user's logger, from whatever thread is at work."""
    _native.call_back(_native.follow(pointer), "log", Severity.__members__[severity], text)


class IProfiler(_Extension):
    def report_layer_time(self, layer_name, ms):
        raise RuntimeError('Tried to call pure virtual function "IProfiler::report_layer_time"')


class Profiler(IProfiler):
    def report_layer_time(self, layer_name, ms):
        print(f"{layer_name}: {ms}ms")


class IProgressMonitor(_Extension):
    def phase_start(self, phase_name, parent_phase, num_steps):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phaseStart"')

    def step_complete(self, phase_name, step):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::stepComplete"')

    def phase_finish(self, phase_name):
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phaseFinish"')


class IInt8Calibrator(_Extension):
    _algorithm = None

    def get_batch_size(self):
        raise RuntimeError('Tried to call pure virtual function "get_batch_size"')

    def get_batch(self, names):
        raise RuntimeError('Tried to call pure virtual function "get_batch"')

    def read_calibration_cache(self):
        raise RuntimeError('Tried to call pure virtual function "read_calibration_cache"')

    def write_calibration_cache(self, cache):
        raise RuntimeError('Tried to call pure virtual function "write_calibration_cache"')

    def get_algorithm(self):
        return getattr(_values.CalibrationAlgoType, self._algorithm)


def _calibrator(name, algorithm):
    """A calibrator class, with the methods of the base declared again as the bindings do."""
    methods = {key: value for key, value in vars(IInt8Calibrator).items() if not key.startswith("__")}
    methods.update(_algorithm=algorithm, __module__="tensorrt._extensions")
    return _native.NativeType(name, (IInt8Calibrator,), methods)


IInt8LegacyCalibrator = _calibrator("IInt8LegacyCalibrator", "LEGACY_CALIBRATION")
IInt8EntropyCalibrator = _calibrator("IInt8EntropyCalibrator", "ENTROPY_CALIBRATION")
IInt8EntropyCalibrator2 = _calibrator("IInt8EntropyCalibrator2", "ENTROPY_CALIBRATION_2")
IInt8MinMaxCalibrator = _calibrator("IInt8MinMaxCalibrator", "MINMAX_CALIBRATION")
