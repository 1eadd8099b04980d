"""The worker through the doubles of TensorRT and libcudart: it builds, benchmarks and evaluates on every version's
surface, in every Python that is there. This proves the worker's plumbing, not that TensorRT builds or runs anything.

A process for each pair of Python and version does all that is asked of that pair; the tests look at what came of it.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import doubles
import numpy as np
import onnxruntime
import pytest
from doubles import THOROUGH, networks
from safetensors.numpy import load_file

from jetway.tasks.on_device import passport
from jetway.tasks.target.agent import build_agent

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
RUN_WORKER = Path(doubles.FOLDER) / "run_worker.py"
TIMEOUT_S = 120
#: The Python that comes with each version where it comes with a JetPack.
FIELD = {
    "8.0.1.6": "3.6",
    "8.2.1.8": "3.6",
    "8.4.1.5": "3.8",
    "8.5.2.2": "3.8",
    "8.6.1.6": "3.10",
    "10.3.0": "3.10",
    "10.7.0": "3.10",
    "10.13.3.9": "3.12",
    "10.16.1.11": "3.12",
}
#: What a Python that comes with none is tried with; with the slow tests, every Python is with every version.
NEWEST = "11.4.0.106"
#: The JetPacks that are tried by default, each in its own Python.
JETPACKS = ("8.2.1.8", "8.5.2.2", "10.3.0", "10.13.3.9")
BUILD = {"workspace_mib": [64], "detailed_layers": True}
SAMPLES = 5


def found_pythons():
    """Interpreters by version, such as 3.6: the tests' own, and pyenv's."""
    found = {}
    for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")):
        minor = re.match(r"3\.(\d+)", path.parts[-3])
        if minor and int(minor[1]) >= 6:
            found[f"3.{minor[1]}"] = str(path)
    return {**found, OWN: sys.executable}


PYTHONS = found_pythons()


def pairs():
    for python in sorted(PYTHONS, key=lambda text: int(text[2:])):
        for version in doubles.CUDA_OF_TENSORRT:
            stray = python not in FIELD.values() and version == NEWEST
            own = python == OWN and version in THOROUGH
            chosen = own or stray or (version in JETPACKS and FIELD[version] == python)
            marks = [] if chosen else [pytest.mark.slow]
            yield pytest.param((python, version), id=f"python{python}-tensorrt{version}", marks=marks)


def major(version):
    return int(version.split(".")[0])


def has_dla(version):
    return major(version) < 10 or version in ("10.0.1", "10.3.0", "10.7.0", "11.4.0.106")


def precisions(version):
    """What the version can be asked for."""
    found = ["fp32", "fp16", "int8"]
    return (
        found
        + (["bf16"] if major(version) >= 10 else [])
        + (["int8-calibrated"] if major(version) < 11 else [])
    )


class Plan:
    """The verbs for one process, by name, and later what came of each."""

    def __init__(self, files):
        self.files = files
        self.names, self.verbs = [], []

    def add(self, name, verb, request, **variables):
        self.names.append(name)
        self.verbs.append([verb, request, {key: str(value) for key, value in variables.items()}])

    def build(self, name, onnx, variables=None, **options):
        path = self.files[onnx]
        request = {
            "onnx": path,
            "onnx_sha256": passport.file_sha256(path),
            "inputs": self.files["one"],
            "threads": 1,
            "revision": 1,
            "engine": "tensorrt",
            "options": {**BUILD, **options},
        }
        self.add(name, "build", request, **(variables or {}))

    def entry(self, name):
        """An engine of an earlier build."""
        index = self.names.index(name)
        return {
            "name": name,
            "path": {"from_verb": index, "keys": ["engine"]},
            "sha256": {"from_verb": index, "keys": ["passport", "engine_sha256"]},
            "inputs": self.files["one"],
        }

    def evaluate(self, name, engine, **variables):
        self.add(
            name, "evaluate", {"engine": self.entry(engine), "inputs": [self.files["images"]]}, **variables
        )

    def benchmark(self, engines):
        request = {
            "warmup_runs": 1,
            "min_queries": 5,
            "min_duration_s": 0.01,
            "slice_s": 0.002,
            "max_drift_ratio": 9,
        }
        request |= {"max_extensions": 0, "max_duration_s": 10, "seed": 1, "keep_loaded": True}
        request |= {"scenarios": ["latency", "throughput"], "profile_layers": True}
        request |= {"throughput": {"warmup_ms": 1, "min_duration_s": 0.01}}
        request |= {"engines": [self.entry(name) for name in engines], "canary": self.entry(engines[0])}
        self.add("benchmark", "benchmark", request)


def fault(text):
    return {"TENSORRT_DOUBLE_FAULT": text}


def calibration(files, **extra):
    return {"algorithm": "entropy", "batches": files["batches"], "cache": None, **extra}


def plan_of(python, version, files):
    """Every precision, evaluation and benchmark; what else there is to prove, in the tests' Python."""
    plan = Plan(files)
    plan.add("probe", "probe", {})
    for precision in ("fp32", "fp16", "bf16", "int8"):
        plan.build(precision, precision, precision=precision)
    plan.build("int8-calibrated", "fp32", precision="int8-calibrated", calibration=calibration(files))
    shapes = {kind: [batch, 1, 8, 8] for kind, batch in (("min", 1), ("opt", 2), ("max", 4))}
    plan.build("open", "open", profiles=[{"image": shapes}])
    plan.evaluate("evaluate fp32", "fp32")
    plan.evaluate("evaluate open", "open")
    plan.benchmark(["fp32", "fp16"])
    if python == OWN and version in THOROUGH:
        add_the_rest(plan, files)
    return plan


def add_the_rest(plan, files):
    for precision in ("fp16", "bf16", "int8", "int8-calibrated"):
        plan.evaluate(f"evaluate {precision}", precision)
    ladder = {"workspace_mib": [64, 32, 16]}
    plan.build("ladder", "fp32", fault("out_of_memory_above:20"), **ladder)
    plan.build(
        "killed",
        "fp32",
        fault("killed_above:40"),
        **ladder,
        optimization_level=None,
        max_aux_streams=None,
        tf32=True,
    )
    plan.build("no memory", "external", fault("out_of_memory_above:1"), **ladder)
    plan.build("crash", "external", fault("crash"), **ladder)
    plan.build("unsupported", "external", fault("unsupported:GlobalAveragePool"))
    plan.build("disk full", "external", fault("disk_full"))
    plan.build("external", "external")
    plan.evaluate("evaluate external", "external")
    plan.build("graph", "fp32", cuda_graph=True)
    plan.evaluate("evaluate graph", "graph")
    plan.build("zero copy", "fp32", {"CUDART_DOUBLE_INTEGRATED": 1}, zero_copy=True)
    plan.evaluate("evaluate zero copy", "zero copy", CUDART_DOUBLE_INTEGRATED=1)
    plan.build(
        "minmax", "fp32", precision="int8-calibrated", calibration=calibration(files, algorithm="minmax")
    )
    held = {"Gemm*": "fp32"}
    plan.build(
        "mixed",
        "fp32",
        precision="int8-calibrated",
        calibration=calibration(files),
        mixed=held,
        int8_rest="fp16",
    )
    dla = {"dla": {"core": 1, "gpu_fallback": True, "layers": {"Gemm*": "GPU"}}}
    plan.build("no dla", "fp16", precision="fp16", **dla)
    plan.build("dla", "fp16", {"TENSORRT_DOUBLE_DLA_CORES": 2}, precision="fp16", **dla)
    for name, options in OPTIONS.items():
        plan.build(name, "fp32", **options)


#: Options that only some versions have: the class member, or the enum's, that decides.
OPTIONS = {
    "IBuilderConfig.builder_optimization_level": {"optimization_level": 1},
    "IBuilderConfig.max_aux_streams": {"max_aux_streams": 0},
    "BuilderFlag.VERSION_COMPATIBLE": {"version_compatible": True},
    "HardwareCompatibilityLevel.AMPERE_PLUS": {"hardware_compatibility": "ampere_plus"},
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": {
        "hardware_compatibility": "same_compute_capability"
    },
    "TacticSource.CUBLAS_LT": {"tactic_sources": ["CUBLAS_LT"]},
    "TacticSource.JIT_CONVOLUTIONS": {"tactic_sources": ["JIT_CONVOLUTIONS"]},
}
SURFACE = doubles.surface()


def has(version, name):
    known = next(key for key in SURFACE[name] if f"{version}.".startswith(f"{key}."))
    return SURFACE[name][known] != "-"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    (folder / "agent.zip").write_bytes(build_agent())
    with zipfile.ZipFile(folder / "agent.zip") as archive:
        archive.extractall(folder / "agent")  # where each Python keeps what it compiles
    found = networks.write_networks(folder)
    found["agent"] = str(folder / "agent")
    found["one"] = networks.write_images(folder / "one.safetensors", 1)
    found["images"] = networks.write_images(folder / "images.safetensors", SAMPLES)
    found["batches"] = [networks.write_images(folder / f"{seed}.safetensors", 1, seed) for seed in range(3)]
    return found


class Outcomes(dict):
    """Results by the plan's names; ``error`` of a verb that failed."""

    def __init__(self, python, version, outcomes):
        super().__init__({name: outcome.get("result") for name, outcome in outcomes.items()})
        self.python, self.version = python, version
        self.errors = {name: outcome["error"] for name, outcome in outcomes.items() if "error" in outcome}

    def result(self, name):
        assert name not in self.errors, self.errors[name]
        return self[name]

    def outputs(self, name):
        """The arrays that an evaluation wrote, samples of all batches together."""
        given = load_file(self.result(name)["outputs"][0]["path"])
        starts = sorted({int(key.rpartition(".")[2]) for key in given})
        return {
            each: np.concatenate([given[f"{each}.{start}"] for start in starts])
            for each in ("logits", "label")
        }


def run_pair(pair, files, folder, doubles_folder):
    python, version = pair
    plan = plan_of(python, version, files)
    environment = os.environ | doubles.installation(doubles_folder, version)
    folder.mkdir()
    done = subprocess.run(
        [PYTHONS[python], str(RUN_WORKER), files["agent"], str(folder)],
        input=json.dumps(plan.verbs), env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Outcomes(python, version, dict(zip(plan.names, json.loads(done.stdout), strict=True)))


@pytest.fixture(scope="session")
def runs(request, files, tmp_path_factory, doubles_folder):
    """What comes of each pair that is asked for, some at a time."""
    asked = [
        item.callspec.params["outcomes"] for item in request.session.items if "outcomes" in item.fixturenames
    ]
    folder = tmp_path_factory.mktemp("targets")
    for version in doubles.CUDA_OF_TENSORRT:
        doubles.installation(doubles_folder, version)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {
            pair: pool.submit(run_pair, pair, files, folder / "-".join(pair), doubles_folder)
            for pair in dict.fromkeys(asked)
        }


@pytest.fixture(scope="session", params=pairs())
def outcomes(request, runs):
    return runs[request.param].result()


def test_the_probe_tells_what_this_version_has(outcomes):
    facts = outcomes.result("probe")["engines"]["tensorrt"]
    assert facts["available"]
    assert facts["double"]
    assert facts["version"] == outcomes.version
    assert sorted(facts["precisions"]) == sorted(precisions(outcomes.version))
    assert facts["weakly_typed"] == (major(outcomes.version) < 11)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8-calibrated"])
def test_each_precision_is_built_with_the_flags_of_the_version(outcomes, precision):
    if precision not in precisions(outcomes.version):
        assert outcomes.errors[precision]["kind"] in ("mismatch", "bad_request", "build_failed")
        return
    built = outcomes.result(precision)
    facts = built["passport"]
    assert Path(built["engine"]).read_bytes().startswith(b"TENSORRT DOUBLE")
    assert facts["platform"]["engine"] == "tensorrt"
    assert facts["platform"]["double"]
    assert facts["options"]["precision"] == precision
    assert {*facts["flags"]} == expected_flags(outcomes.version, precision)
    assert facts["ladder"][0]["outcome"] == "built"


def expected_flags(version, precision):
    """Weak typing needs a flag for each precision; strong typing, in 10 where the file carries it, bears none."""
    weak = major(version) < 10 or (precision == "int8-calibrated" and major(version) < 11)
    flags = {"fp16": {"FP16"}, "int8": {"INT8"}, "int8-calibrated": {"INT8"}}.get(precision, set())
    return flags if weak else set()


def test_calibration_reads_every_batch_and_keeps_a_cache(outcomes):
    if "int8-calibrated" not in precisions(outcomes.version):
        pytest.skip("this version has no calibrators")
    facts = outcomes.result("int8-calibrated")["passport"]["calibration"]
    assert facts["batches"] == 3
    assert re.match(rb"TRT-\d+-EntropyCalibration2\n", Path(facts["cache"]["path"]).read_bytes())


def test_a_later_build_finds_the_timing_cache(outcomes):
    assert not outcomes.result("fp32")["passport"]["timing_cache"]["hit"]
    assert outcomes.result("fp16")["passport"]["timing_cache"]["hit"]


def expected_logits(outcomes, files):
    """ONNX Runtime's in the tests' Python, where the double uses it; elsewhere the double's pattern."""
    images = load_file(files["images"])["image"]
    if outcomes.python == OWN:
        session = onnxruntime.InferenceSession(files["fp32"], providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in images])
    return np.stack([pattern("logits", image.tobytes()) for image in images])


def pattern(name, data):
    seed = hashlib.sha256(name.encode() + data).digest()
    return np.array([seed[index] / 128 - 1 for index in range(networks.CLASSES)], dtype=np.float32)


def test_outputs_come_back_for_every_sample(outcomes, files):
    given = outcomes.outputs("evaluate fp32")
    np.testing.assert_allclose(given["logits"], expected_logits(outcomes, files), rtol=1e-5, atol=1e-6)
    assert given["label"].shape == (SAMPLES,)


def test_integers_are_64_bits_wide_from_version_10_on(outcomes):
    wide = np.int64 if major(outcomes.version) >= 10 else np.int32
    assert outcomes.outputs("evaluate fp32")["label"].dtype == wide


def test_an_open_batch_runs_at_the_profiles_optimum(outcomes, files):
    given = outcomes.outputs("evaluate open")
    assert given["logits"].shape == (SAMPLES, networks.CLASSES)
    if outcomes.python == OWN:
        np.testing.assert_allclose(given["logits"], expected_logits(outcomes, files), rtol=1e-4, atol=1e-5)


def test_the_benchmark_times_each_engine(outcomes):
    result = outcomes.result("benchmark")
    samples = load_file(result["samples"]["path"])
    for name in ("fp32", "fp16"):
        times = [array for key, array in samples.items() if key.startswith(name)]
        assert times
        assert all((array >= 0).all() for array in times)
        assert result["memory"][name]["peak"] > 0


def test_the_benchmark_keeps_queries_in_flight(outcomes):
    found = outcomes.result("benchmark")["throughput"]
    assert set(found) == {"fp32", "fp16"}
    assert all(facts["queries_per_s"] > 0 for facts in found.values())


def test_layers_have_the_profilers_times_and_the_inspectors_precision(outcomes):
    rows = outcomes.result("benchmark")["layers"]["fp16"]
    assert sum(row["share_ratio"] for row in rows) == pytest.approx(1)
    names = [row["name"] for row in rows]
    assert "Conv_1 + Relu_2" in names
    precision = rows[names.index("Conv_1 + Relu_2")]["precision"]
    assert precision == (None if outcomes.version == "8.0.1.6" else "fp16")  # 8.0 has no inspector


# What is looked at in the tests' own Python

OWN_PAIRS = [pair for pair in pairs() if pair.values[0][0] == OWN and pair.values[0][1] in THOROUGH]
own = pytest.mark.parametrize("outcomes", OWN_PAIRS, indirect=True)


@own
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8-calibrated"])
def test_each_precision_gives_the_networks_outputs(outcomes, files, precision):
    if precision not in precisions(outcomes.version):
        pytest.skip("this version does not have it")
    given = outcomes.outputs(f"evaluate {precision}")["logits"]
    wrong = np.abs(given - expected_logits(outcomes, files)).max()
    assert wrong < 0.5
    assert (wrong > 0) == (precision != "int8-calibrated")  # the double computes that one in float


@own
def test_the_ladder_goes_down_until_memory_is_enough(outcomes):
    facts = outcomes.result("ladder")["passport"]
    assert [rung["outcome"] for rung in facts["ladder"]] == ["out_of_memory", "out_of_memory", "built"]
    assert facts["workspace_mib"] == 16
    assert [rung["outcome"] for rung in outcomes.result("killed")["passport"]["ladder"]] == [
        "killed",
        "built",
    ]


@own
@pytest.mark.parametrize(
    ("name", "cause", "words"),
    [
        ("no memory", "out_of_memory", "16 MiB"),
        ("crash", "unknown", "SIGSEGV"),
        ("unsupported", "unsupported_operator", "GlobalAveragePool"),
        ("disk full", "disk_full", "No space left"),
    ],
)
def test_failed_builds_name_their_cause(outcomes, name, cause, words):
    error = outcomes.errors[name]
    assert (error["kind"], error["cause"]) == ("build_failed", cause)
    assert words in error["message"]


@own
@pytest.mark.parametrize("name", ["external", "graph", "zero copy"])
def test_outputs_are_the_same(outcomes, name):
    """With weights in a file of their own, through a CUDA graph, and without copies."""
    ours = outcomes.outputs("evaluate fp32")
    for key, array in outcomes.outputs(f"evaluate {name}").items():
        np.testing.assert_array_equal(array, ours[key])


@own
@pytest.mark.parametrize("name", ["minmax", "mixed"])
def test_calibration_in_its_other_forms(outcomes, name):
    if "int8-calibrated" not in precisions(outcomes.version):
        assert outcomes.errors[name]["kind"] in ("mismatch", "bad_request")
        return
    facts = outcomes.result(name)["passport"]
    if name == "mixed":
        assert "INT8" in facts["flags"]
        assert {"OBEY_PRECISION_CONSTRAINTS", "STRICT_TYPES"} & {*facts["flags"]}
    else:
        assert b"MinMaxCalibration" in Path(facts["calibration"]["cache"]["path"]).read_bytes()


@own
def test_layers_are_placed_on_the_dla_where_there_is_one(outcomes):
    assert outcomes.errors["no dla"]["kind"] == "mismatch"
    if not has_dla(outcomes.version):
        assert outcomes.errors["dla"]["kind"] == "mismatch"
        return
    facts = outcomes.result("dla")["passport"]
    devices = {entry["layer"].split("_")[0]: entry["device"] for entry in facts["placement"]}
    assert (devices["Conv"], devices["Gemm"], devices["Flatten"]) == ("DLA", "GPU", "GPU")
    assert "GPU_FALLBACK" in facts["flags"]
    assert facts["platform"]["dla_core"] == 1


@own
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_set_or_refused_with_its_key(outcomes, name):
    key = next(iter(OPTIONS[name]))
    if has(outcomes.version, name):
        assert outcomes.result(name)["passport"]["options"][key] == OPTIONS[name][key]
    else:
        assert outcomes.errors[name]["kind"] == "mismatch"
        assert f"tensorrt.{key}" in outcomes.errors[name]["message"]


#: Guards that stand alone, by the version to try them on.
ALONE = {
    "8.0.1.6": [
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.max_aux_streams",
        "IExecutionContext.enqueue_emits_profile",
        "IExecutionContext.report_to_profiler",
        "IExecutionContext.set_input_shape",
        "ICudaEngine.get_tensor_profile_shape",
        "LayerInformationFormat.JSON",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ParserError.node_name",
        "ProfilingVerbosity.DETAILED",
    ],
    "8.6.1.6": [
        "DataType.BF16",
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "ParserError.node_operator",
    ],
    "10.7.0": [
        "BuilderFlag.STRICT_TYPES",
        "ProfilingVerbosity.VERBOSE",
    ],
    "11.4.0.106": ["BuilderFlag.FP16", "tensorrt.IInt8EntropyCalibrator2", "tensorrt.IInt8MinMaxCalibrator"],
}


@pytest.mark.parametrize("version", ALONE)
def test_without_its_guard_the_worker_breaks(version, files, doubles_folder):
    """That names are guarded is shown from the source (tests/unit/test_tensorrt_names.py); that it matters, here."""
    settings = doubles.installation(doubles_folder, version, TENSORRT_DOUBLE_COMPUTE="pattern")
    settings["PYTHONPATH"] += os.pathsep + str(doubles.FOLDER.parent)
    done = subprocess.run(
        [sys.executable, doubles.FOLDER / "try_mutants.py", Path(files["one"]).parent, *ALONE[version]],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {name for name, found in outcomes.items() if found != ["same"] * len(found)} == {*ALONE[version]}
