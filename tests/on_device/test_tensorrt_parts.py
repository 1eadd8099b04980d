"""Parts of the TensorRT backend that need no TensorRT."""

import pytest

from jetway.configs.schema import Backend, DlaConfig, EngineName, Precision, TensorRtConfig
from jetway.tasks.engine_options import engine_options
from jetway.tasks.on_device import children
from jetway.tasks.on_device.errors import BUILD_FAILED, DeviceError
from jetway.tasks.on_device.tensorrt_engine import (
    calibration,
    dla,
    failure,
    ladder,
    logger,
    options,
    parser,
    profiles,
    progress,
)


def normalised(**given):
    return options.normalised({"options": given})


def test_every_option_has_a_default():
    found = options.normalised({})
    assert found == options.DEFAULTS
    assert options.for_loading(found) == {
        "version_compatible": False, "cuda_graph": False, "zero_copy": False, "streams": 1, "dla_core": None,
    }  # fmt: skip


def test_defaults_of_inner_sections_are_filled():
    assert normalised(dla={"core": 1})["dla"] == {"core": 1, "gpu_fallback": True, "layers": {}}
    assert options.for_loading(normalised(dla={"core": 1}))["dla_core"] == 1


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"presicion": "fp16"}, "tensorrt does not know presicion"),
        ({"precision": "fp8"}, "tensorrt.precision is 'fp8'"),
        ({"mixed": {"*": "int8"}}, "tensorrt.mixed is 'int8'"),
        ({"hardware_compatibility": "all"}, "tensorrt.hardware_compatibility"),
        ({"workspace_mib": []}, "tensorrt.workspace_mib"),
        ({"workspace_mib": [256, 1024]}, "tensorrt.workspace_mib"),
        ({"workspace_mib": [0]}, "tensorrt.workspace_mib"),
        ({"dla": {"cores": 1}}, "tensorrt.dla does not know cores"),
        ({"precision": "int8-calibrated"}, "tensorrt.calibration goes with"),
        ({"calibration": {"cache": "c"}}, "tensorrt.calibration goes with"),
        ({"precision": "int8-calibrated", "calibration": {}}, "neither batches nor a cache"),
        (
            {"precision": "int8-calibrated", "calibration": {"algorithm": "best", "cache": "c"}},
            "tensorrt.calibration.algorithm",
        ),
    ],
)
def test_bad_options_name_the_key(given, key):
    with pytest.raises(DeviceError) as caught:
        normalised(**given)
    assert key in str(caught.value)
    assert caught.value.kind == "bad_request"


@pytest.mark.parametrize("precision", sorted(set(Precision) - {Precision.INT8_DYNAMIC}))
def test_what_the_host_sends_is_understood(precision):
    """The recipe's section and ours have the same keys."""
    config = TensorRtConfig(dla=DlaConfig())
    sent = engine_options(Backend(engine=EngineName.TENSORRT), precision, config, ["batch"])
    found = options.normalised({"options": sent})
    assert set(found) == set(options.DEFAULTS) == set(sent)


def test_calibration_files_are_recorded_by_digest(tmp_path):
    (tmp_path / "batch").write_bytes(b"same")
    (tmp_path / "copy").write_bytes(b"same")
    first, second = (
        options.recorded(
            normalised(precision="int8-calibrated", calibration={"batches": [str(tmp_path / name)]})
        )
        for name in ("batch", "copy")
    )
    assert first == second
    assert len(first["calibration"]["batches"][0]) == 64


# Why a build failed


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Error Code 2: OutOfMemory (no further information)", "out_of_memory"),
        ("[executionContext.cpp] Error Code 1: Cuda Runtime (out of memory)", "out_of_memory"),
        ("Requested amount of GPU memory (8589934592 bytes) could not be allocated.", "out_of_memory"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "out_of_memory"),
        ("NvMapMemAllocInternalTagged: 1075072515 error 12", "out_of_memory"),
        ("Cudnn Error in initializeCommonContext: CUDNN_STATUS_ALLOC_FAILED", "out_of_memory"),
        ("Could not find any implementation for node a due to insufficient workspace.", "small_workspace"),
        ("Try increasing the workspace size with IBuilderConfig::setMemoryPoolLimit()", "small_workspace"),
        ("write: No space left on device", "disk_full"),
        ("Layer (Conv_0) is not supported on DLA, and GPU fallback is not enabled", "unsupported_operator"),
        (
            "Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}",
            "unsupported_operator",
        ),
        ("Error Code 4: Internal Error", "unknown"),
    ],
)
def test_words_and_their_causes(text, cause):
    assert failure.cause_of(text) == cause


def messages(*pairs):
    found = logger.Messages()
    for severity, text in pairs:
        found.add(severity, text)
    return found


def test_warnings_tell_why_no_kernel_was_found():
    no_kernel = ("ERROR", "Error Code 10: Could not find any implementation for node a")
    hint = (
        "WARNING",
        "Skipping tactic 3 due to insufficient memory on requested size of 4111 detected for tactic 60",
    )
    assert failure.of_messages("x", messages(no_kernel)).cause == "unsupported_operator"
    error = failure.of_messages("x", messages(hint, no_kernel))
    assert error.cause == "small_workspace"
    assert "larger rung" in str(error)


def test_warnings_do_not_hide_a_disk_that_is_full():
    found = messages(("WARNING", "out of memory"), ("ERROR", "No space left on device"))
    assert failure.of_messages("x", found).cause == "disk_full"


def test_messages_are_kept_in_order_and_warnings_once(capsys):
    found = messages(("WARNING", "b"), ("INFO", "never"), ("WARNING", "a"), ("WARNING", "b"), ("ERROR", "e"))
    assert (found.warnings(), found.errors()) == (["b", "a"], ["e"])
    assert "never" not in capsys.readouterr().err
    found.clear()
    assert (found.warnings(), found.errors()) == ([], [])


@pytest.mark.parametrize(
    ("returncode", "log", "cause"),
    [(-9, "", "killed"), (-6, "std::bad_alloc", "out_of_memory"), (-11, "NvMapMemAlloc: 1 error 12", "out_of_memory"),
     (-11, "", "unknown"), (1, "MemoryError", "unknown"), (1, "OSError: No space left on device", "disk_full")],
)  # fmt: skip
def test_deaths_and_their_causes(returncode, log, cause):
    assert failure.of_outcome(children.Outcome([], returncode, log, None)).cause == cause


def test_a_kill_for_memory_is_the_kernels():
    assert "the kernel, as memory was short" in str(failure.of_outcome(children.Outcome([], -9, "", 1)))
    assert "killed by SIGKILL" in str(failure.of_outcome(children.Outcome([], -9, "", 0)))


# The ladder, with children that are told how to end


class Children:
    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.tried = []

    def run(self, module, function, request, relay, tick):
        self.tried.append(request["workspace_mib"])
        relay({"done": 0.5, "total": 1, "text": "half way"})
        tick()
        line, returncode = self.outcomes.pop(0)
        return children.Outcome([line] if line else [], returncode, "", None)


BUILT = ({"result": {"layers": 4}}, 0)
KILLED = (None, -9)
NO_MEMORY = ({"error": DeviceError("no memory", BUILD_FAILED, "out_of_memory").to_json()}, 0)
NO_DISK = ({"error": DeviceError("no disk", BUILD_FAILED, "disk_full").to_json()}, 0)


def climb(tmp_path, *outcomes):
    work, lines = Children(*outcomes), []
    request = {"options": {"workspace_mib": [4096, 1024, 256]}, "engine_path": str(tmp_path / "engine")}
    try:
        return ladder.build(request, lines.append, work.run), work.tried, lines
    except DeviceError as exc:
        return exc, work.tried, lines


def test_the_first_rung_that_holds_is_the_last(tmp_path):
    facts, tried, lines = climb(tmp_path, NO_MEMORY, KILLED, BUILT)
    assert tried == [4096, 1024, 256]
    assert facts["layers"] == 4
    assert facts["workspace_mib"] == 256
    assert [rung["outcome"] for rung in facts["ladder"]] == ["out_of_memory", "killed", "built"]
    texts = [line["text"] for line in lines]
    assert "4096 MiB of workspace: out_of_memory" in texts
    assert "1024 MiB of workspace: killed" in texts
    assert "building with 256 MiB of workspace: half way" in texts
    assert "building with 256 MiB of workspace: 0 s" in texts


def test_the_last_rung_tells_of_all(tmp_path):
    error, tried, _ = climb(tmp_path, NO_MEMORY, NO_MEMORY, KILLED)
    assert tried == [4096, 1024, 256]
    assert error.cause == "killed"
    assert "4096 MiB out_of_memory, 1024 MiB out_of_memory, 256 MiB killed" in str(error)


def test_what_less_memory_cannot_help_ends_the_ladder(tmp_path):
    error, tried, _ = climb(tmp_path, NO_MEMORY, NO_DISK)
    assert tried == [4096, 1024]
    assert error.cause == "disk_full"


def test_a_workspace_that_is_too_small_is_not_made_smaller(tmp_path):
    too_small = {"error": failure.build_failed("no kernel", "small_workspace").to_json()}
    error, tried, _ = climb(tmp_path, NO_MEMORY, (too_small, 0))
    assert tried == [4096, 1024]
    assert "larger rung" in str(error)
    assert "4096 MiB out_of_memory, 1024 MiB small_workspace" in str(error)


def test_a_failed_rung_leaves_no_engine(tmp_path):
    (tmp_path / "engine").write_bytes(b"half an engine")
    climb(tmp_path, NO_DISK)
    assert not (tmp_path / "engine").exists()


# Steps


def steps_of(report=lambda line: None):
    return progress.Steps(report)


def test_inner_phases_count_as_part_of_a_step():
    steps = steps_of()
    steps.start("build", None, 4)
    assert steps.share() == 0
    steps.step("build", 0)
    steps.start("tactics", "build", 2)
    steps.step("tactics", 0)
    assert steps.share() == pytest.approx((1 + 0.5) / 4)
    steps.finish("tactics")
    steps.step("build", 3)
    assert steps.share() == 1


def test_progress_does_not_go_backwards(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0)
    lines = []
    steps = steps_of(lines.append)
    steps.start("first", None, 2)
    steps.step("first", 0)
    steps.finish("first")
    steps.start("second", None, 10)
    steps.step("second", 0)
    assert [line["done"] for line in lines] == [0.5, 0.5]


def test_lines_are_half_a_second_apart():
    lines = []
    steps = steps_of(lines.append)
    steps.start("build", None, 1000)
    assert all(steps.step("build", step) for step in range(1000))
    assert len(lines) == 1


def test_a_build_that_nobody_waits_for_is_cancelled():
    def broken(line):
        raise BrokenPipeError

    steps = steps_of(broken)
    steps.start("build", None, 2)
    assert not steps.step("build", 0)
    assert not steps.step("build", 1)


# Profiles


OPEN = [profiles.Input("image", [-1, 3, 8, 8], False)]
FIXED = [profiles.Input("image", [1, 3, 8, 8], False)]


def shapes(low=1, best=2, high=4, **others):
    return {"min": [low, 3, 8, 8], "opt": [best, 3, 8, 8], "max": [high, 3, 8, 8], **others}


def test_a_static_network_needs_no_profile():
    assert profiles.wanted([], FIXED, {"image": [1, 3, 8, 8]}) == []


def test_inputs_that_the_network_does_not_have_are_left_out():
    assert profiles.wanted([], OPEN, {"image": [2, 3, 8, 8], "unused": [1]}) == [{"image": shapes(2, 2, 2)}]
    assert profiles.wanted([{"image": shapes(), "unused": shapes()}], OPEN, {}) == [{"image": shapes()}]


@pytest.mark.parametrize(
    ("asked", "inputs", "words"),
    [
        ({}, OPEN, "must give min, opt and max of ['image']"),
        ({"picture": shapes()}, OPEN, "names ['picture'], but the network's inputs are ['image']"),
        ({"image": {"min": [1, 3, 8, 8]}}, OPEN, "lacks min, opt or max"),
        ({"image": shapes(low=3)}, OPEN, "needs min <= opt <= max"),
        ({"image": shapes(min=[1, 3])}, OPEN, "needs min <= opt <= max"),
        ({"image": shapes(1, 1, 2)}, FIXED, "the network has [1, 3, 8, 8]"),
        ({"image": {kind: [1, 3, 8, 9] for kind in profiles.KINDS}}, OPEN, "the network has [-1, 3, 8, 8]"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(asked, inputs, words):
    with pytest.raises(DeviceError) as caught:
        profiles.wanted([asked], inputs, {})
    assert words in str(caught.value)
    assert str(caught.value).startswith("tensorrt.profiles")


def test_values_of_a_shape_are_no_shape():
    inputs = [profiles.Input("size", [2], True)]
    asked = {"size": {"min": [8, 8], "opt": [16, 16], "max": [32, 32]}}
    assert profiles.wanted([asked], inputs, {}) == [asked]
    with pytest.raises(DeviceError, match="must give min, opt and max"):
        profiles.wanted([{}], inputs, {})


def test_a_dla_takes_profiles_of_one_shape():
    assert profiles.is_static([])
    assert profiles.is_static([{"image": shapes(2, 2, 2)}])
    assert not profiles.is_static([{"image": shapes(2, 2, 2)}, {"image": shapes()}])


# What the parser says


class ParserError:
    """An error of onnx-tensorrt before version 10, which does not name the node."""

    def __init__(self, text, node, code="UNSUPPORTED_NODE"):
        self._text, self._node = text, node
        self._code = type("ErrorCode", (), {"name": code})

    def code(self):
        return self._code

    def desc(self):
        return self._text

    def node(self):
        return self._node


NODES = [{"name": "stem", "operator": "Conv"}, {"name": "odd", "operator": "Frobnicate"}]


@pytest.mark.parametrize(
    ("text", "index", "node", "operator"),
    [
        ("No importer registered for op: Frobnicate. Attempting plugin.", 1, "odd", "Frobnicate"),
        ("Assertion failed: creator && 'Plugin not found'", 1, "odd", "Frobnicate"),
        ("In node 7 with name: inner and operator: Twiddle (parseNode): INVALID", 0, "inner", "Twiddle"),
        ("No importer registered for op: Twiddle", 1, "", "Twiddle"),
        ("something else", -1, "", ""),
        ("something else", 9, "", ""),
    ],
)
def test_old_errors_are_placed_by_their_words_and_the_file(text, index, node, operator):
    found = parser.describe(ParserError(text, index), NODES)
    assert (found["node"], found["operator"]) == (node, operator)


def test_many_errors_are_counted_and_all_in_the_log(capsys):
    found = [parser.describe(ParserError(f"no {number}", 1), NODES) for number in range(100)]
    error = parser.failure(found, "8.2.1.8")
    assert f"and {100 - parser.SHOWN} more" in str(error)
    assert capsys.readouterr().err.count("\n") == 100
    assert error.cause == "unsupported_operator"


def test_one_error_of_another_kind_is_no_unsupported_operator():
    found = [
        parser.describe(ParserError("no", 1, code), NODES) for code in ("UNSUPPORTED_NODE", "INVALID_GRAPH")
    ]
    assert parser.failure(found, "8.2.1.8").cause == "unknown"


# Calibration caches and DLA globs


@pytest.mark.parametrize(
    ("first_line", "version", "algorithm", "fits"),
    [
        (b"TRT-8201-EntropyCalibration2", "8.2.1.8", "entropy", True),
        (b"TRT-8502-MinMaxCalibration", "8.5.2.2", "minmax", True),
        (b"TRT-100300-EntropyCalibration2", "10.3.0", "entropy", True),
        (b"TRT-8201-EntropyCalibration2", "8.5.2.2", "entropy", False),
        (b"TRT-8201-EntropyCalibration2", "8.2.1.8", "minmax", False),
        (b"image: 3c010a14", "8.2.1.8", "entropy", False),
    ],
)
def test_a_cache_says_whose_it_is(first_line, version, algorithm, fits):
    assert calibration.fits(first_line + b"\nimage: 3c010a14\n", algorithm, version) is fits


def test_the_last_glob_that_matches_decides():
    globs = {"head/*": "GPU", "*/relu": "DLA"}
    assert dla.wanted_device("stem/conv", globs) == "DLA"
    assert dla.wanted_device("head/conv", globs) == "GPU"
    assert dla.wanted_device("head/relu", globs) == "DLA"


def test_what_tensorrt_said_is_the_reason():
    placement = [
        {"layer": "a", "asked": "DLA", "device": "GPU", "reason": "the DLA cannot run it"},
        {"layer": "b", "asked": "DLA", "device": "GPU", "reason": "the DLA cannot run it"},
        {"layer": "conv_1", "asked": "DLA", "device": "GPU", "reason": "the DLA cannot run it"},
        {"layer": "c", "asked": "DLA", "device": "DLA", "reason": ""},
    ]
    said = [
        "layer a is not supported on DLA, falling back to GPU.",
        "conv_10 is too large for the DLA",
        "c on DLA",
    ]
    reasons = [entry["reason"] for entry in dla.with_words(placement, said)]
    assert reasons == [said[0], "the DLA cannot run it", "the DLA cannot run it", ""]
