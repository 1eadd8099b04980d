"""int8 by calibration: TensorRT runs batches in float and takes the ranges from what it sees.

Only where the version has calibrators (TensorRT 10 and older).
"""

import re
from typing import Any, Dict, List, Optional, Sequence

from jetway.tasks.on_device import cuda, errors, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import bindings
from jetway.tasks.on_device.tensorrt_engine.profiles import Input

KEY = "tensorrt.calibration"
HEADER = re.compile(rb"TRT-(?P<version>\d+)-(?P<algorithm>\w+)")
ALGORITHMS = {"entropy": b"EntropyCalibration2", "minmax": b"MinMaxCalibration"}


class Feed:
    """Batches for a calibrator, one file each, in device memory; and the cache, before and after.

    ``inputs`` are what TensorRT will read. An error cannot pass through it, so it waits in ``error``.
    """

    def __init__(self, paths: List[str], inputs: List[Input], cache: Optional[bytes]) -> None:
        self._paths = list(paths)
        self._inputs = {one.name: one for one in inputs}
        self._buffers = {}  # type: Dict[str, Any]
        self._runtime = None  # type: Any
        self.batch_size = _batch_size(paths)
        self.cache = cache
        self.written = None  # type: Optional[bytes]
        self.batches = 0
        self.error = None  # type: Optional[Exception]

    def next(self, names: List[str]) -> Optional[List[int]]:
        """Device pointers of the next batch, in the order of the names; None at the end."""
        if not self._paths or self.error:
            return None
        try:
            return self._load(self._paths.pop(0), names)
        except Exception as exc:
            self.error = exc
            return None

    def _load(self, path: str, names: List[str]) -> List[int]:
        if self._runtime is None:
            self._runtime = cuda.CudaRuntime()
        given = tensors.read_tensors(path)
        missing = sorted(set(names) - set(given))
        if missing:
            raise DeviceError(
                "The calibration batch {} lacks the inputs {}; it has {}.".format(
                    path, missing, sorted(given)
                ),
                errors.BAD_REQUEST,
            )
        for name in names:
            self._check_shape(path, name, given[name].shape)
            self._copy(name, given[name].cast(self._inputs[name].dtype).data)
        self.batches += 1
        return [self._buffers[name].pointer for name in names]

    def _check_shape(self, path: str, name: str, shape: Sequence[int]) -> None:
        tuned = self._inputs[name].shape
        if list(shape) != tuned:
            raise DeviceError(
                "The calibration batch {} has {!r} of the shape {}, and the build is tuned for {}: let example_inputs "
                "and opt of tensorrt.profiles have the same shape.".format(path, name, list(shape), tuned),
                errors.BAD_REQUEST,
            )

    def _copy(self, name: str, data: memoryview) -> None:
        if name not in self._buffers:
            self._buffers[name] = self._runtime.device_buffer(len(data))
        buffer = self._buffers[name]
        host, stream = self._runtime.pinned_buffer(len(data)), self._runtime.stream()
        host.host[:] = data
        self._runtime.copy_in(buffer, host, stream)()
        stream.synchronize()
        stream.close()
        host.close()

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


def _batch_size(paths: List[str]) -> int:
    """Samples of a batch, which TensorRT asks for though the network says it."""
    header = tensors.read_header(paths[0])[0] if paths else {}
    sizes = [1]  # type: List[int]
    sizes += [entry["shape"][0] for entry in header.values() if entry["shape"]]
    return max(sizes)


def feed_of(asked: Dict[str, Any], inputs: List[Input], version: str) -> Feed:
    """The feed for a build. Raises DeviceError where all there is is a cache of another version."""
    cache = _read(asked["cache"])
    if cache is None or fits(cache, asked["algorithm"], version):
        return Feed(asked["batches"], inputs, cache)
    if asked["batches"]:
        return Feed(asked["batches"], inputs, None)
    raise DeviceError(
        "{}: the cache begins with {!r}, and this is {} of TensorRT {}. Give it batches, or a cache of this "
        "version.".format(KEY, cache[:40], asked["algorithm"], version),
        errors.MISMATCH,
    )


def _read(path: Optional[str]) -> Optional[bytes]:
    if not path:
        return None
    with open(path, "rb") as file:
        return file.read()


def fits(cache: bytes, algorithm: str, version: str) -> bool:
    """Whether the cache is this version's and this algorithm's, as its first line says."""
    match = HEADER.match(cache)
    return bool(
        match
        and match.group("algorithm") == ALGORITHMS[algorithm]
        and int(match.group("version")) in numbers(version)
    )


def numbers(version: str) -> List[int]:
    """How TensorRT writes a version as one number: 8.2.1 is 8201, 10.3.0 is 100300."""
    major, minor, patch = [int(part) for part in version.split(".")[:3]]
    return [major * 1000 + minor * 100 + patch, major * 10000 + minor * 100 + patch]


def calibrator(algorithm: str, feed: Feed) -> Any:
    """TensorRT's calibrator over the feed; the caller keeps it until the build is over."""
    trt = bindings.module()
    if algorithm == "entropy" and bindings.has(trt, "IInt8EntropyCalibrator2"):
        return _subclass(trt.IInt8EntropyCalibrator2, feed)
    if algorithm == "minmax" and bindings.has(trt, "IInt8MinMaxCalibrator"):
        return _subclass(trt.IInt8MinMaxCalibrator, feed)
    raise bindings.absent("int8 calibration", "variants", "Use int8, whose ONNX file carries the ranges.")


def _subclass(base: Any, feed: Feed) -> Any:
    class Calibrator(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return feed.batch_size

        def get_batch(self, names: List[str]) -> Optional[List[int]]:
            return feed.next(names)

        def read_calibration_cache(self) -> Optional[bytes]:
            return feed.cache

        def write_calibration_cache(self, cache: Any) -> None:
            feed.written = bytes(cache)

    return Calibrator()


def attach(config: Any, native: Any, profiles: List[Any]) -> None:
    """Gives the build its calibrator, and where shapes are open the profile whose ``opt`` the batches have."""
    if bindings.has(config, "int8_calibrator"):
        config.int8_calibrator = native
    if profiles and bindings.has(config, "set_calibration_profile"):
        config.set_calibration_profile(profiles[0])
