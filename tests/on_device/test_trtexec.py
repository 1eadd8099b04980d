"""Reading trtexec, and asking every version of it for the same. tests/data/trtexec/README.md says what is real."""

import json
import subprocess
import sys
from pathlib import Path

import doubles
import numpy as np
import pytest
from doubles import trtexec_double

from jetway.tasks.on_device import throughput, trtexec
from jetway.tasks.on_device.errors import DeviceError

DATA = Path(__file__).parents[1] / "data" / "trtexec"
DOUBLE = trtexec_double.__file__
VERSIONS = list(doubles.CUDA_OF_TENSORRT)
PLAIN = {"dla_core": None, "version_compatible": False, "zero_copy": False}
QUICK = dict(throughput.DEFAULTS, warmup_ms=50.0, min_duration_s=1.0)
KNOWN = {version: set(trtexec_double.known_flags(version)) for version in VERSIONS}
MODES = [(graph, transfers, spin) for graph in (0, 1) for transfers in (0, 1) for spin in (0, 1)]


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A program that is the double, in the current folder."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "trtexec"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{DOUBLE}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "small.engine").write_bytes(b"TENSORRT DOUBLE")
    return str(program)


def read(name):
    return trtexec.parse_log((DATA / name).read_text())


def test_a_log_of_8_2():
    report = read("8.2.log")
    assert report["passed"]
    assert report["version"] == "8.2.1"
    assert report["queries_per_s"] == 499.25
    assert report["walltime_s"] == 3.00451
    assert report["gpu_compute_total_s"] == 3.0002
    assert report["gpu_compute_ms"] == {"min": 1.9, "max": 2.6, "mean": 2.0, "median": 1.99, "p99": 2.5}
    assert report["end_to_end_ms"]["median"] == 3.91
    assert report["enqueue_ms"]["median"] == 0.39
    assert report["h2d_ms"]["p99"] == 0.18
    assert report["d2h_ms"]["min"] == 0.05
    assert report["latency_ms"]["max"] == 2.9
    assert report["warnings"] == []


def test_a_log_of_11_whose_second_run_is_for_the_profile():
    report = read("11.0.log")
    assert report["passed"]
    assert report["version"] == "11.0.0"
    assert report["queries_per_s"] == 129477.0
    assert report["latency_ms"]["median"] == 0.00741577
    assert report["latency_ms"]["p95"] == 0.0085
    assert report["h2d_ms"]["max"] == 0.0
    assert [text.split(",")[0][:30] for text in report["warnings"]] == [
        "Throughput may be bound by Enq",
        "GPU compute time is unstable",
    ]


def test_a_log_without_an_end_has_not_passed():
    log = (DATA / "8.2.log").read_text()
    assert not trtexec.parse_log(log[: log.index("&&&& PASSED")])["passed"]
    assert not trtexec.parse_log(log.replace("PASSED", "FAILED"))["passed"]
    assert trtexec.parse_log("Segmentation fault")["version"] is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(8001, "8.0.1"), (8502, "8.5.2"), (100300, "10.3.0"), (101303, "10.13.3"), (110400, "11.4.0")],
)
def test_versions_as_trtexec_writes_them(number, text):
    assert trtexec.version_text(number) == text


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("graph", "transfers", "spin"), MODES)
def test_flags_mean_the_same_on_every_version(double, monkeypatch, version, graph, transfers, spin):
    """What the program says that it does, whatever its defaults are."""
    monkeypatch.setenv("TENSORRT_DOUBLE_VERSION", version)
    settings = dict(QUICK, cuda_graph=bool(graph), transfers=bool(transfers), spin_wait=bool(spin), streams=2)
    command = trtexec.flags(KNOWN[version], "/no/such.engine", dict(settings, in_flight=1), PLAIN)
    log = subprocess.run([double, *command], capture_output=True, text=True, check=False).stdout
    assert "Unknown option" not in log
    for name, value in (("Data transfers", transfers), ("Spin-wait", spin), ("CUDA Graph", graph)):
        assert f"{name}: {'Enabled' if value else 'Disabled'}" in log
    assert "--exposeDMA" in command
    assert ("--infStreams=2" in command) == (version >= "8.6" or version[0] == "1")


def test_flags_are_known_from_the_programs_own_help(double, monkeypatch):
    monkeypatch.setenv("TENSORRT_DOUBLE_VERSION", "10.3.0")
    assert trtexec.known_flags(double) == KNOWN["10.3.0"]


def test_flags_of_what_the_engine_was_loaded_with():
    options = {"dla_core": 1, "version_compatible": True, "zero_copy": True}
    command = trtexec.flags(KNOWN["10.3.0"], "e", QUICK, options)
    assert {"--useDLACore=1", "--versionCompatible", "--useManagedMemory", "--noDataTransfers"} <= set(
        command
    )
    assert trtexec.shapes_flag({"image": [1, 3, 8, 8], "b": [2]}) == "--shapes=b:2,image:1x3x8x8"


@pytest.mark.parametrize("version", ["8.2.1.8", "8.5.2.2", "11.0.0.114"])
def test_a_run_is_read_with_all_its_percentiles(double, monkeypatch, version):
    monkeypatch.setenv("TENSORRT_DOUBLE_VERSION", version)
    report = trtexec.measure(double, "small.engine", QUICK, PLAIN, {})
    assert "failed" not in report
    assert version.startswith(report["version"])
    for name in ("latency_ms", "h2d_ms", "gpu_compute_ms", "d2h_ms"):
        assert {"min", "max", "mean", "median", "p90", "p95", "p99"} <= set(report[name])
    assert 0.99 < report["gpu_compute_ms"]["p90"] < 1.02
    assert report["command"][0] == double
    assert not Path("trtexec-times.json").exists()


@pytest.mark.parametrize(
    ("fault", "words"), [("fail", "asks for this fault"), ("", "No such file|Permission denied|not found")]
)
def test_a_failing_run_says_why(double, monkeypatch, fault, words):
    monkeypatch.setenv("TENSORRT_DOUBLE_VERSION", "8.5.2.2")
    monkeypatch.setenv("TRTEXEC_DOUBLE_FAULT", fault)
    path = double if fault else "/no/such/trtexec"
    report = trtexec.measure(path, "small.engine", QUICK, PLAIN, {})
    assert not report["passed"]
    assert any(word in report["failed"] for word in words.split("|"))


def test_exported_times_of_old_versions_hold_the_warm_up(tmp_path):
    def row(start_ms, compute_ms, **extra):
        times = {"h2dMs": 0.5, "computeMs": compute_ms, "d2hMs": 0.25, "latencyMs": compute_ms + 0.75}
        return {"startComputeMs": start_ms, **times, **extra}

    rows = [row(i * 10.0, 9.0 if i < 20 else 2.0) for i in range(120)]
    path = tmp_path / "times.json"
    path.write_text(json.dumps(rows))
    everything = trtexec.read_times(str(path), 200.0)
    assert everything["gpu_compute_ms"]["max"] == 9.0
    path.write_text(json.dumps([{**one, "endToEndMs": 3.0} for one in rows]))
    kept = trtexec.read_times(str(path), 200.0)
    assert kept["gpu_compute_ms"]["max"] == kept["gpu_compute_ms"]["p99"] == 2.0
    assert kept["latency_ms"]["median"] == 2.75


def test_what_the_log_says_wins_over_the_exported_times():
    report = trtexec.with_times(
        {"latency_ms": {"median": 2.0, "p99": 3.0}}, {"latency_ms": {"median": 2.1, "p90": 2.5, "p99": 3.1}}
    )
    assert report["latency_ms"] == {"median": 2.0, "p90": 2.5, "p99": 3.0}


def test_profiles_of_all_versions_and_the_table_of_layers(tmp_path):
    profile, information = tmp_path / "profile.json", tmp_path / "layers.json"
    old = [{"count": 100}, {"name": "conv", "timeMs": 30.0, "averageMs": 0.3, "percentage": 75.0}]
    profile.write_text(json.dumps(old))
    assert trtexec.read_profile(str(profile)) == [("conv", 0.3)]
    new = [*old[:1], {**old[1], "medianMs": 0.29}, {"name": "relu", "averageMs": 0.01, "medianMs": 0.01}]
    profile.write_text(json.dumps(new))
    information.write_text('{"Layers": [{"Name": "conv", "LayerType": "Conv\x1f"}], "Bindings": []}')
    table = trtexec.read_layers(str(information), str(profile))
    assert [(row["name"], row["type"], row["time_ms"]) for row in table] == [
        ("conv", "Conv\x1f", 0.29),
        ("relu", None, 0.01),
    ]


def test_real_exports_are_read():
    table = trtexec.read_layers(
        str(DATA / "mobilenet.qat.graph.json"), str(DATA / "mobilenet.qat.profile.json")
    )
    assert [(row["type"], row["precision"], row["time_ms"]) for row in table] == [
        ("Reformat", "mixed", 0.0122041),
        ("CaskConvolution", "int8", 0.0107465),
        (None, None, 0.00610625),
    ]
    times = trtexec.read_times(str(DATA / "resnet.timing.json"), warmup_ms=200.0)
    assert times["gpu_compute_ms"]["median"] == pytest.approx(1.9159)
    assert times["latency_ms"]["max"] == pytest.approx(1.93843)
    assert times["h2d_ms"]["max"] == 0.0


def test_outputs_may_hold_what_json_does_not_know(tmp_path):
    path = tmp_path / "output.json"
    path.write_text(
        '[\n  { "name" : "logits"\n  , "dimensions" : "1x4"\n  , "values" : [ 1.5, inf, -inf, -nan ]\n  }\n]'
    )
    found = trtexec.read_outputs(str(path))["logits"]
    assert found["shape"] == [1, 4]
    np.testing.assert_array_equal(found["values"], [1.5, np.inf, -np.inf, np.nan])


def test_differences_are_ratios_of_ours_to_theirs():
    def report(median, qps):
        times = {name: {"median": median} for name in trtexec.COMPARED}
        return {**times, "h2d_ms": {"median": 0.0}, "queries_per_s": qps}

    found = trtexec.differences(report(1.01, 990.0), report(1.0, 1000.0))
    assert found["gpu_compute_ms"] == pytest.approx(0.01)
    assert found["queries_per_s"] == pytest.approx(-0.01)
    assert found["h2d_ms"] is None


def test_it_is_found_where_it_was_named_where_jetpack_has_it_or_on_the_path(double, monkeypatch, tmp_path):
    assert trtexec.find(double) == double
    monkeypatch.setenv("PATH", "/no/such/folder")
    with pytest.raises(DeviceError, match=r"benchmark\.trtexec: there is no trtexec") as caught:
        trtexec.find()
    assert caught.value.kind == "mismatch"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trtexec.find() == double
    monkeypatch.setenv("JETWAY_SIMULATED_ROOT", str(tmp_path / "root"))
    usual = tmp_path / "root/usr/src/tensorrt/bin/trtexec"
    usual.parent.mkdir(parents=True)
    usual.symlink_to(double)
    assert trtexec.find() == str(usual)
