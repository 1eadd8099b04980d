"""An engine for GPU tests: a network of torchvision, captured by PyTorch as a CUDA graph.

It goes into the agent beside the others, so that everything else of a benchmark runs as with TensorRT: the worker,
the CUDA layer, both scenarios, the power pass and the telemetry. An "ONNX file" of it is JSON: ``network`` (a name
of torchvision.models), ``batch``, ``size``, ``dtype``, ``seed``. Weights are random: times do not depend on them.
"""

import ctypes
import json
import shutil

from jetway.tasks.on_device.cuda import Buffer, CudaRuntime, Graph
from jetway.tasks.on_device.tensors import Tensor

# It takes TensorRT's place in the registry: the passes for an engine with streams are TensorRT's.
NAME = "tensorrt"


def version():
    import torch

    return torch.__version__


def facts():
    return {"available": True, "version": version()}


def build_options(request):
    return request.get("options", {})


def load_options(request):
    return {"streams": 1}


def platform_facts(options):
    import torch  # loads the libcudart that the engine will use

    facts = CudaRuntime().facts()
    gpu = {key: facts[key] for key in ("pci_bus_id", "compute_capability")}
    return {"engine": NAME, "engine_version": torch.__version__, "gpu": gpu}


def build(request, engine_path, progress):
    shutil.copyfile(request["onnx"], engine_path)
    return {}


def inspect(engine_path, options, inputs):
    return {}


def borrowed(tensor):
    """PyTorch's memory as a Buffer, which PyTorch frees."""
    return Buffer(tensor.numel() * tensor.element_size(), tensor.data_ptr(), 0, lambda: None)


class Session:
    def __init__(self, path, options):
        import torch

        with open(path) as file:
            self.spec = json.load(file)
        torch.manual_seed(self.spec["seed"])
        torch.backends.cudnn.benchmark = True
        self.cuda = CudaRuntime()
        self.output_names = ["logits"]
        self.input_shapes = {"image": [self.spec["batch"], 3, self.spec["size"], self.spec["size"]]}
        self.warnings = []
        self.network = self._network()
        self.lane = Lane(self)

    def _network(self):
        import torch
        import torchvision

        network = getattr(torchvision.models, self.spec["network"])(weights=None).eval().cuda()
        return network.to(getattr(torch, self.spec["dtype"]), memory_format=torch.channels_last)

    def batch_limits(self):
        return self.spec["batch"], self.spec["batch"]

    def inputs_of(self, given):
        return {"image": given["image"]}

    def query(self, inputs):
        self.lane.prepare(inputs)
        return self.lane.query()

    def run(self, inputs):
        self.query(inputs)()
        return self.lane.outputs()

    run_checked = run

    def lanes(self, count, inputs):
        found = [self.lane] + [Lane(self) for _ in range(count - 1)]
        for lane in found:
            lane.prepare(inputs)
        return found

    def device_memory_bytes(self):
        import torch

        return torch.cuda.memory_reserved()

    def close(self):
        import torch

        self.lane.close()
        self.network = self.lane = None
        torch.cuda.empty_cache()


class Lane:
    """The network's graph on static tensors, with pinned memory on the host's side."""

    def __init__(self, session):
        self.cuda = session.cuda
        self.stream = self.cuda.stream()
        self._capture(session)
        self.device_in, self.device_out = borrowed(self.input), borrowed(self.output)
        self.host_in = self.cuda.pinned_buffer(self.device_in.size_bytes)
        self.host_out = self.cuda.pinned_buffer(self.device_out.size_bytes)
        self.graphs = []

    def _capture(self, session):
        import torch

        size, dtype = session.spec["size"], getattr(torch, session.spec["dtype"])
        self.input = torch.zeros(session.spec["batch"], 3, size, size, dtype=dtype, device="cuda")
        side = torch.cuda.Stream()
        with torch.no_grad():
            with torch.cuda.stream(side):
                for _ in range(3):
                    session.network(self.input)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(self.graph):
                self.output = session.network(self.input).contiguous()

    def prepare(self, inputs):
        import torch

        values = torch.frombuffer(bytearray(inputs["image"].data), dtype=torch.float32).to(self.input.dtype)
        self.host_in.host[:] = values.view(torch.uint8).numpy().tobytes()

    def enqueue(self, stream):
        handle = self.cuda._instantiate(ctypes.c_void_p(self.graph.raw_cuda_graph()))
        self.graphs.append(Graph(self.cuda, handle, stream))
        return self.graphs[-1].launch

    def copies_in(self, stream):
        return [self.cuda.copy_in(self.device_in, self.host_in, stream)]

    def copies_out(self, stream):
        return [self.cuda.copy_out(self.host_out, self.device_out, stream)]

    def query(self):
        copy_in, copy_out = self.copies_in(self.stream)[0], self.copies_out(self.stream)[0]
        launch, wait = self.enqueue(self.stream), self.stream.synchronize

        def call():
            copy_in()
            launch()
            copy_out()
            wait()

        return call

    def outputs(self):
        import torch

        raw = torch.frombuffer(bytearray(self.host_out.host), dtype=self.output.dtype).float()
        return [Tensor("F32", list(self.output.shape), raw.numpy().tobytes())]

    def close(self):
        for graph in self.graphs:
            graph.close()
        self.host_in.close()
        self.host_out.close()
        self.stream.close()
