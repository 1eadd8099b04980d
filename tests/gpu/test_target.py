"""A GPU behind a real SSH server: the CUDA layer, both scenarios, telemetry and the power pass on a real network.

The engine is a network of torchvision that PyTorch captured as a CUDA graph (torch_graph_engine.py): TensorRT is not
needed, and everything around it is what measures TensorRT's engines. Run with ``-s`` to see the figures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jetway.configs.schema import EngineName, Target
from jetway.tasks.artifacts import OnnxModel, Tensors
from jetway.tasks.store import Store
from jetway.tasks.target.agent import ON_DEVICE
from jetway.tasks.target.session import TargetSession, open_target

pytestmark = pytest.mark.gpu

NETWORKS = {"resnet50": 224, "resnet18": 224, "canary": 224}
RUNS = 5
BENCHMARK = {
    "warmup_runs": 50,
    "min_queries": 664,
    "min_duration_s": 1.0,
    "slice_s": 0.1,
    "max_drift_ratio": 0.15,
    "max_extensions": 3,
    "max_duration_s": 300,
    "seed": 0,
    "scenarios": ["latency"],
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's sources with the test's engine among them."""
    folder = tmp_path_factory.mktemp("agent") / "on_device"
    shutil.copytree(ON_DEVICE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("torch_graph_engine.py", "overhead.py"):
        shutil.copy(Path(__file__).with_name(module), folder)
    with (folder / "engines.py").open("a") as file:
        file.write(
            "\nfrom jetway.tasks.on_device import torch_graph_engine\n"
            "ENGINES[torch_graph_engine.NAME] = torch_graph_engine\n"
        )
    return folder


@pytest.fixture(scope="module")
def session(agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetSession]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETWAY_HOME", str(tmp_path_factory.mktemp("home")))
        target = Target(name="gpu", kind="loopback", engine=EngineName.TENSORRT, work_dir="work")
        with open_target(target, agent_folder=agent) as opened:
            yield opened


@pytest.fixture(scope="module")
def entries(session: TargetSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each network built on the target, as an entry of a benchmark."""
    folder = tmp_path_factory.mktemp("networks")
    store = Store(folder / "store")
    return {name: build(session, store, folder, name, size) for name, size in NETWORKS.items()}


def build(session: TargetSession, store: Store, folder: Path, name: str, size: int) -> dict[str, Any]:
    network = "mobilenet_v2" if name == "canary" else name
    spec = {"network": network, "batch": 1, "size": size, "dtype": "float16", "seed": 0}
    (folder / f"{name}.json").write_text(json.dumps(spec))
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    save_file({"image": image}, folder / f"{name}.safetensors")
    onnx = store.add(OnnxModel, folder / f"{name}.json")
    inputs = store.add(Tensors, folder / f"{name}.safetensors")
    remote = session.push(inputs, store.open(inputs))
    request = {
        "onnx": session.push(onnx, store.open(onnx)),
        "onnx_sha256": onnx.sha256,
        "inputs": remote,
        "engine": "tensorrt",
        "options": {},
        "threads": 1,
        "revision": 1,
    }
    built = session.run_job("build", request, timeout_s=300)
    return {
        "name": name,
        "path": built["engine"],
        "sha256": built["passport"]["engine_sha256"],
        "inputs": remote,
    }


@pytest.fixture(scope="module")
def measure(session: TargetSession, entries: dict[str, dict[str, Any]]) -> Any:
    def run(*names: str, **changes: Any) -> dict[str, Any]:
        request = {
            **BENCHMARK,
            "engines": [entries[name] for name in names],
            "canary": entries["canary"],
            **changes,
        }
        return session.run_job("benchmark", request, timeout_s=600)

    return run


@pytest.fixture(scope="module")
def measured(measure: Any) -> dict[str, Any]:
    """Both scenarios and the power pass, with telemetry."""
    result: dict[str, Any] = measure(
        "resnet50",
        "resnet18",
        scenarios=["latency", "throughput"],
        throughput={"streams": 1, "in_flight": 2, "spin_wait": True, "min_duration_s": 3},
        telemetry=True,
        power={"duration_s": 12, "idle_s": 5, "interval_ms": 50},
    )
    show("result", {key: value for key, value in result.items() if not isinstance(value, list)})
    return result


def show(name: str, value: Any) -> None:
    print(f"\n{name}: {json.dumps(value, indent=1, default=str)}")


def latencies_ms(result: dict[str, Any], name: str) -> np.ndarray:
    latencies: np.ndarray = load_file(result["samples"]["path"])[f"{name}.latency_ns"] / 1e6
    return latencies


def test_the_session_is_valid(measured: dict[str, Any]) -> None:
    assert measured["reasons"] == []
    assert measured["simulated"] is False


def test_the_loop_adds_less_than_a_percent_to_a_query(session: TargetSession, entries: Any) -> None:
    """The timed loop against the same calls in a row, timed as one; slices of both take turns."""
    result = session.run_job("overhead", {"entry": entries["resnet50"]}, timeout_s=120)
    show("overhead", result)
    assert result["p50_ms"] > 0.3
    assert abs(result["overhead_ratio"]) <= 0.01


def test_the_gpu_never_waits_for_the_host_in_the_throughput_scenario(measured: dict[str, Any]) -> None:
    """Queries a second times the compute of each is the share of the time in which the GPU computes."""
    for name in ("resnet50", "resnet18"):
        figures = measured["throughput"][name]
        busy_ratio = figures["queries_per_s"] * figures["gpu_compute_ms"]["mean"] / 1e3
        show(f"{name} busy ratio", busy_ratio)
        assert 0.97 <= busy_ratio <= 1.01


def test_a_query_alone_takes_its_transfers_and_compute(measured: dict[str, Any]) -> None:
    """The host's clock around one query is above the GPU's own sum, by no more than launches and the wait."""
    for name in ("resnet50", "resnet18"):
        alone_ms = float(np.median(latencies_ms(measured, name)))
        gpu_ms = measured["throughput"][name]["latency_ms"]["median"]
        show(f"{name} alone, by the GPU", [alone_ms, gpu_ms])
        assert gpu_ms * 0.9 <= alone_ms <= gpu_ms + 0.15


def test_the_counters_energy_agrees_with_the_samples(measured: dict[str, Any]) -> None:
    for name in ("resnet50", "resnet18"):
        figures = measured["power"]["variants"][name]
        counted = figures["energy_mj_per_inference_from_counter"]
        sampled = figures["energy_mj_per_inference_from_samples"]
        show(f"{name} power", figures)
        assert abs(sampled / counted - 1) <= 0.05


def test_the_median_is_the_same_in_every_run(measure: Any) -> None:
    """The whole session anew each time, in a process of its own."""
    medians = [float(np.median(latencies_ms(measure("resnet50"), "resnet50"))) for _ in range(RUNS)]
    variation = float(np.std(medians, ddof=1) / np.mean(medians))
    show("p50 of resnet50 in ms, and its coefficient of variation", [medians, variation])
    assert variation <= 0.01
