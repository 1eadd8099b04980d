"""Running an engine: a context, its memory, and queries, without numpy and on every version of TensorRT."""

import contextlib
import mmap
import sys
from typing import Any, Callable, Dict, List, Tuple

from jetway.tasks.on_device import errors, tensors
from jetway.tasks.on_device.cuda import Buffer, CudaRuntime, Stream
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import bindings, failure, io_tensors, logger
from jetway.tasks.on_device.tensorrt_engine.inspector import engine_information, layer_times
from jetway.tasks.on_device.tensorrt_engine.io_tensors import IoTensor, Shape
from jetway.tasks.on_device.tensors import Tensor

Call = Callable[[], Any]


class Session:
    """A loaded engine. Construction loads it; ``options`` are its ``load_options``.

    Everything it holds is given back by ``close``, in the order that TensorRT wants: memory and streams, contexts,
    the engine, the runtime.
    """

    def __init__(self, path: str, options: Dict[str, Any]) -> None:
        self.options = options
        self.cuda = CudaRuntime()
        self.warnings = []  # type: List[str]
        self._closing = contextlib.ExitStack()
        self._runtime = _runtime(options)
        self.engine = _engine(self._runtime, path)
        self.tensors = io_tensors.io_tensors(self.engine)
        self.output_names = [tensor.name for tensor in self.tensors if not tensor.is_input]
        self.input_shapes = {tensor.name: list(tensor.shape) for tensor in self.tensors if tensor.is_input}
        if options["zero_copy"]:
            _check_integrated(self.cuda)
        self.lane = self.new_lane(0)

    def new_lane(self, number: int) -> "Lane":
        """Another context, with memory and streams of its own."""
        lane = Lane(self, number)
        self._closing.callback(lane.close)
        return lane

    def batch_limits(self) -> Tuple[int, int]:
        """Fewest samples that a call takes, and the number that suits it: an open batch's ``opt``."""
        inputs = [tensor for tensor in self.tensors if tensor.is_input and tensor.shape]
        limits = [self.sample_limits(tensor) for tensor in inputs] or [(1, 1)]
        return max(low for low, _ in limits), min(best for _, best in limits)

    def sample_limits(self, tensor: IoTensor) -> Tuple[int, int]:
        if tensor.shape[0] != -1:
            return tensor.shape[0], tensor.shape[0]
        low, best, _ = io_tensors.profile_shapes(self.engine, tensor, 0)
        return low[0], best[0]

    def inputs_of(self, given: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """The tensors that the engine takes."""
        return tensors.picked(self.input_shapes, given)

    def run(self, inputs: Dict[str, Tensor]) -> List[Tensor]:
        """Outputs in the order of ``output_names``."""
        self.query(inputs)()
        return self.lane.outputs()

    def run_checked(self, inputs: Dict[str, Tensor]) -> List[Tensor]:
        """``run`` with an error that shows the inputs."""
        try:
            return self.run(inputs)
        except DeviceError as exc:
            shown = {name: str(tensor) for name, tensor in inputs.items()}
            raise DeviceError("The engine fails on the inputs {}: {}".format(shown, exc), exc.kind, exc.cause)

    def query(self, inputs: Dict[str, Tensor]) -> Call:
        """The timed call: inputs from pinned memory to the GPU, compute, outputs to pinned memory, wait.

        The inputs are in pinned memory when this returns. The call holds until the next ``run`` or ``query``.
        """
        self.lane.prepare(inputs)
        return self.lane.query()

    def lanes(self, count: int, inputs: Dict[str, Tensor]) -> List["Lane"]:
        """So many contexts that can run at once, each with these inputs.

        One is ready before the next is made: old versions give a new context the first profile that is free.
        """
        self.lane.prepare(inputs)
        found = [self.lane]
        for number in range(1, count):
            found.append(self.new_lane(number))
            found[-1].prepare(inputs)
        return found

    def layers(self, inputs: Dict[str, Tensor], runs: int) -> Any:
        """The inspector's JSON, or None, and for each run the times of the layers. No query is to be timed after."""
        self.lane.prepare(inputs)
        return self.lane.layers(runs)

    def device_memory_bytes(self) -> int:
        """What a context takes for its activations; weights and buffers come on top."""
        return io_tensors.device_memory_bytes(self.engine)

    def warn(self, text: str) -> None:
        """Kept, and told in the job's log; once."""
        if text not in self.warnings:
            self.warnings.append(text)
            sys.stderr.write(text + "\n")

    def close(self) -> None:
        """Gives all memory back; no other method works after it."""
        self._closing.close()
        self.engine = None
        self._runtime = None


def _runtime(options: Dict[str, Any]) -> Any:
    trt = bindings.module()
    trt.init_libnvinfer_plugins(logger.shared(), "")
    try:
        runtime = trt.Runtime(logger.shared())
    except TypeError as exc:  # what the bindings raise when TensorRT returns a null pointer
        raise _failed("TensorRT cannot start: {}".format(exc), errors.MISMATCH)
    if options["dla_core"] is not None:
        runtime.DLA_core = options["dla_core"]
    if options["version_compatible"]:
        _allow_host_code(runtime)
    return runtime


def _allow_host_code(runtime: Any) -> None:
    """A version-compatible engine carries its own runtime, which is code. We have built it ourselves."""
    if bindings.has(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    else:
        advice = "Leave it out for this target."
        raise bindings.absent("version-compatible engines", "tensorrt.version_compatible", advice)


def _engine(runtime: Any, path: str) -> Any:
    """The file is mapped, so that it is in memory once while it is read."""
    logger.shared().messages.clear()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _failed(
            "TensorRT {} cannot load {}".format(bindings.module().__version__, path), errors.MISMATCH
        )
    return engine


def _failed(what: str, otherwise: str) -> DeviceError:
    """The error for a step that gave nothing back; TensorRT's log alone says why."""
    words = "; ".join(logger.shared().messages.errors()) or "nothing"
    kind = errors.OUT_OF_MEMORY if failure.cause_of(words) == "out_of_memory" else otherwise
    return DeviceError("{}. TensorRT says: {}".format(what, " ".join(words.split())[-1500:]), kind)


def _check_integrated(cuda: CudaRuntime) -> None:
    if not cuda.attribute("integrated"):
        raise DeviceError(
            "tensorrt.zero_copy: the GPU has memory of its own, and reading the host's would be slower than to copy. "
            "Leave it out for this target.",
            errors.MISMATCH,
        )


class Memory:
    """Where one tensor lives: ``device`` for the GPU, ``host`` for us; one and the same without copies."""

    def __init__(self, device: Buffer, host: Buffer, tensor: IoTensor, shape: Shape) -> None:
        self.device = device
        self.host = host
        self.tensor = tensor
        self.shape = shape

    def fill(self, value: Tensor) -> None:
        self.host.host[:] = value.cast(self.tensor.dtype).data

    def value(self) -> Tensor:
        return Tensor(self.tensor.dtype, self.shape, bytes(self.host.host))

    def is_copied(self) -> bool:
        return self.device is not self.host

    def close(self) -> None:
        self.host.close()
        if self.is_copied():
            self.device.close()


def in_turn(calls: List[Call]) -> Call:
    def call() -> None:
        for one in calls:
            one()

    return call


class Lane:
    """One context with its memory; queries of several lanes can run at once."""

    def __init__(self, session: Session, number: int) -> None:
        self.session = session
        self.number = number
        self.cuda = session.cuda
        self.stream = self.cuda.stream()
        self.context = _context(session.engine)
        self.profile = 0
        self._shapes = None  # type: Any
        self._memory = {}  # type: Dict[str, Memory]
        self._enqueue_on = None  # type: Any
        self._graphs = []  # type: List[Any]
        self._query = None  # type: Any

    def prepare(self, inputs: Dict[str, Tensor]) -> None:
        """Sets the shapes, takes the memory, and puts the inputs where copies start from."""
        shapes = {name: value.shape for name, value in inputs.items()}
        if shapes != self._shapes:
            self._release()
            self._set_shapes(shapes)
            self._take_memory(shapes)
            self._shapes = shapes
        for name, value in inputs.items():
            self._memory[name].fill(value)

    def _inputs(self) -> List[IoTensor]:
        return [tensor for tensor in self.session.tensors if tensor.is_input]

    def _set_shapes(self, shapes: Dict[str, Shape]) -> None:
        for tensor in self._inputs():
            _check_shape(tensor, shapes[tensor.name])
        opened = [tensor for tensor in self._inputs() if tensor.is_open()]
        if opened:
            self._choose_profile(shapes)
        for tensor in opened:
            shape = shapes[tensor.name]
            if not io_tensors.set_shape(self.context, tensor, self.profile, shape):
                raise _failed("Input {!r} cannot have the shape {}".format(tensor.name, shape), errors.FAILED)

    def _choose_profile(self, shapes: Dict[str, Shape]) -> None:
        """The first that takes the shapes; the next for the next lane, as old versions share none."""
        engine = self.session.engine
        fitting = [p for p in range(engine.num_optimization_profiles) if self._fits(p, shapes)]
        if not fitting:
            raise DeviceError(
                "No optimization profile of the engine takes the shapes {}. Widen tensorrt.profiles in the recipe, "
                "or give other samples.".format({name: list(shape) for name, shape in shapes.items()}),
                errors.BAD_REQUEST,
            )
        self.profile = fitting[min(self.number, len(fitting) - 1)]
        if not self.context.set_optimization_profile_async(self.profile, self.stream.handle):
            raise _failed("The context cannot take profile {}".format(self.profile), errors.FAILED)
        self.stream.synchronize()

    def _fits(self, profile: int, shapes: Dict[str, Shape]) -> bool:
        for tensor in filter(IoTensor.is_open, self._inputs()):
            low, _, high = io_tensors.profile_shapes(self.session.engine, tensor, profile)
            if not all(least <= size <= most for least, size, most in zip(low, shapes[tensor.name], high)):
                return False
        return True

    def _take_memory(self, shapes: Dict[str, Shape]) -> None:
        for tensor in self._inputs():
            self._take(tensor, shapes[tensor.name])
        for tensor in self.session.tensors:
            if not tensor.is_input:
                self._take(tensor, _known(tensor, io_tensors.shape_of(self.context, tensor, self.profile)))
        addresses = {name: memory.device.pointer for name, memory in self._memory.items()}
        self._enqueue_on = io_tensors.enqueue_on(self.context, self.session.tensors, self.profile, addresses)

    def _take(self, tensor: IoTensor, shape: Shape) -> None:
        size_bytes = tensors.count(shape) * tensors.ITEM_BYTES[tensor.dtype]
        if self.session.options["zero_copy"]:
            device = host = self.cuda.shared_buffer(size_bytes)
        else:
            device, host = self.cuda.device_buffer(size_bytes), self.cuda.pinned_buffer(size_bytes)
        self._memory[tensor.name] = Memory(device, host, tensor, shape)

    def copies_in(self, stream: Stream) -> List[Call]:
        """Bound copies of the inputs to the device."""
        return [
            self.cuda.copy_in(memory.device, memory.host, stream)
            for memory in self._memory.values()
            if memory.tensor.is_input and memory.is_copied()
        ]

    def copies_out(self, stream: Stream) -> List[Call]:
        """Bound copies of the outputs to the host."""
        return [
            self.cuda.copy_out(memory.host, memory.device, stream)
            for memory in self._memory.values()
            if not memory.tensor.is_input and memory.is_copied()
        ]

    def enqueue(self, stream: Stream) -> Call:
        """The bound call that puts one inference on the stream."""
        execute = self._enqueue_on(stream.handle)

        def call() -> None:
            if not execute():
                raise _failed("TensorRT could not enqueue the inference", errors.FAILED)

        return call

    def query(self) -> Call:
        """All of a query as one call that waits for its end; the same as long as the shapes are."""
        if self._query is None:
            steps = self.copies_in(self.stream) + [self._launch()] + self.copies_out(self.stream)
            self._query = in_turn(steps + [self.stream.synchronize])
        query = self._query  # type: Call
        return query

    def layers(self, runs: int) -> Any:
        information = engine_information(self.session.engine, self.context)
        for copy in self.copies_in(self.stream):
            copy()
        enqueue = self.enqueue(self.stream)
        return information, layer_times(self.context, enqueue, self.stream.synchronize, runs)

    def _launch(self) -> Call:
        enqueue = self.enqueue(self.stream)
        if not self.session.options["cuda_graph"]:
            return enqueue
        graph = self.cuda.captured(self.stream, enqueue, self.session.warn)
        if graph is None:
            return enqueue
        self._graphs.append(graph)
        return graph.launch

    def outputs(self) -> List[Tensor]:
        """What the last query has left on the host, in the order of the engine's outputs."""
        return [self._memory[name].value() for name in self.session.output_names]

    def _release(self) -> None:
        for held in self._graphs + list(self._memory.values()):
            held.close()
        self._graphs, self._memory, self._shapes, self._query = [], {}, None, None

    def close(self) -> None:
        self._release()
        self._enqueue_on = None
        self.context = None
        self.stream.close()


def _context(engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise _failed("TensorRT cannot make a context for the engine", errors.FAILED)
    return context


def _check_shape(tensor: IoTensor, shape: Shape) -> None:
    fits = len(shape) == len(tensor.shape) and all(
        size in (-1, given) for size, given in zip(tensor.shape, shape)
    )
    if not fits:
        raise DeviceError(
            "Input {!r} has the shape {}, and the engine takes {} (-1 is open).".format(
                tensor.name, list(shape), list(tensor.shape)
            ),
            errors.BAD_REQUEST,
        )


def _known(tensor: IoTensor, shape: Shape) -> Shape:
    if any(size < 0 for size in shape):
        raise DeviceError(
            "The shape {} of output {!r} depends on the data. Let the network return a fixed number, padded.".format(
                list(shape), tensor.name
            ),
            errors.MISMATCH,
        )
    return shape
