"""Verb ``stream`` in this process, with real engines."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from jetway.tasks.frames import Classes, FrameInput
from jetway.tasks.on_device import latency, machine, stream
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.frames import source

SIZE, FRAMES = 24, 24


@pytest.fixture
def request_of(workplace, networks, tmp_path):
    def make(*names, **changes):
        np.save(tmp_path / "clip.npy", np.zeros((3, 48, 64, 1), np.uint8))
        inputs = workplace.images(1, "input")
        return {
            "engines": [workplace.entry(name, networks["conv"], inputs) for name in names],
            "source": str(tmp_path / "clip.npy"),
            "input": FrameInput(name="image", size=(SIZE, SIZE), colour="gray").model_dump(mode="json"),
            "results": Classes(output="logits").model_dump(mode="json"),
            "frames": FRAMES,
            "warmup_frames": 2,
            "queue_frames": 2,
            "telemetry": False,
            "max_duration_s": 60.0,
            "work_dir": str(workplace.work_dir),
            **changes,
        }

    return make


def run(request):
    return stream.run(request, lambda line: None)


def calm(monkeypatch):
    monkeypatch.setattr(machine, "waited_for_cpu_ns", lambda: 0)


def test_every_engine_gets_its_frames_in_each_round(request_of, monkeypatch):
    calm(monkeypatch)
    result = run(request_of("first", "second"))
    assert result["rounds"] == latency.MIN_ROUNDS
    assert result["reasons"] == []
    assert result["frame_size"] == [64, 48]
    samples = load_file(result["samples"]["path"])
    for name in ("first", "second"):
        assert samples[f"{name}.round"].tolist() == [index // 2 for index in range(FRAMES)]
        for step in ("capture", "preprocess", "infer", "postprocess"):
            assert len(samples[f"{name}.{step}_ns"]) == FRAMES
            assert (samples[f"{name}.{step}_ns"] > 0).all()
        assert all(elapsed_ns > 0 for elapsed_ns in result["side_by_side_ns"][name])


def test_rounds_among_other_processes_are_made_up_for(request_of, monkeypatch):
    """The kernel says that we waited a second for the CPU within the third slice."""
    waited_ns, calls = [0], []

    def waited():
        calls.append(1)
        waited_ns[0] += 1_000_000_000 if len(calls) == 6 else 0
        return waited_ns[0]

    monkeypatch.setattr(machine, "waited_for_cpu_ns", waited)
    result = run(request_of("only"))
    assert result["rounds"] == latency.MIN_ROUNDS + 1
    assert result["excluded_rounds"] == [2]
    assert result["reasons"] == []


def test_a_machine_that_is_never_calm_makes_it_invalid(request_of, monkeypatch):
    waited_ns = iter(range(0, 10**15, 10**9))
    monkeypatch.setattr(machine, "waited_for_cpu_ns", lambda: next(waited_ns))
    result = run(request_of("only"))
    assert result["rounds"] == stream.MAX_ROUNDS_FACTOR * latency.MIN_ROUNDS
    assert "other processes held the CPU in 36 of 36 rounds" in result["reasons"][0]
    assert result["excluded_rounds"] == []


def test_time_that_runs_out_makes_it_invalid(request_of, monkeypatch):
    calm(monkeypatch)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(stream.time, "monotonic", lambda: next(clock))
    result = run(request_of("only", max_duration_s=25.0))
    assert result["rounds"] == 2
    assert "2 of 12 rounds" in result["reasons"][0]
    assert "timeout_s" in result["reasons"][0]


def test_a_target_without_numpy_is_told_what_to_install(request_of, monkeypatch):
    request = request_of("only")
    monkeypatch.setattr(source, "module", lambda name: None)
    with pytest.raises(DeviceError, match="python3-numpy") as caught:
        run(request)
    assert caught.value.kind == "mismatch"
