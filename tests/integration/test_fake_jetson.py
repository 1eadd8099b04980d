"""The whole flow against fake Jetsons: plumbing, on each board's Python, TensorRT surface and kernel files.

Everything that these targets say was made up; nothing here shows that TensorRT builds or runs a network.
"""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from doubles import networks
from doubles.fake_jetson.machines import MACHINES, interpreter

from jetway.configs.schema import BenchmarkConfig, BuildConfig, Target, TensorRtConfig
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.benchmark import benchmark_engines
from jetway.tasks.build import build_engine
from jetway.tasks.errors import ArtifactError, RemoteCommandError, TargetMismatchError
from jetway.tasks.frames import Classes, FrameInput, FrameProcessing
from jetway.tasks.package import package_winner, run_script, unpacked
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.workload import Workload

pytest_plugins = ["doubles.fake_jetson.fixtures"]
pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("default")]

NANO, XAVIER, ORIN, SERVER = (
    "simulated-nano-jp46",
    "simulated-xavier-nx-jp51",
    "simulated-orin-nano-jp62",
    "simulated-server-tensorrt11",
)
#: What each version of TensorRT is told; from 10 on the network itself carries its precision.
FLAGS = {
    (XAVIER, "baseline-fp16"): ["FP16"],
    (XAVIER, "pruned-int8-ptq"): ["INT8"],
    (NANO, "baseline-fp16"): ["FP16"],
}
EVERYTHING = {
    "warmup_runs": 2,
    "min_queries": 30,
    "min_duration_s": 0.1,
    "max_extensions": 1,
    "scenarios": ["latency", "throughput"],
    "throughput": {"min_duration_s": 0.1, "warmup_ms": 10},
    "power": {"duration_s": 0.3, "idle_s": 0.2, "interval_ms": 20},
    "profile_layers": True,
    "trtexec": True,
}


def finished(run):
    """It ran to its end. On a machine that others keep busy its measurement may be INVALID, and must say so."""
    document = run.json
    assert document["status"] == "FINISHED", run.stderr
    valid = all(row["validity"]["valid"] for row in document["variants"])
    assert run.exit_code == (0 if valid else 5), run.stderr
    return {(row["target"], row["variant"]): row for row in document["variants"]}


def passports(home, run):
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    children = tracker.children(run.json["run_id"])
    return {
        (child.tags["target"], child.tags["variant"]): tracker.load_json(child.run_id, "passport.json")
        for child in children
    }


def built(jetson):
    """How often the network itself was built there, canaries apart."""
    return sum(line.startswith("jetway ") for line in jetson.installation.builds())


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_fake_says_of_itself(switch_on, name):
    machine = switch_on(name).machine
    with open_target(Target.model_validate(switch_on(name).target_values())) as session:
        facts = session.call("probe", {})
    assert facts["simulated"]
    engine = facts["engines"]["tensorrt"]
    assert engine["double"]
    assert engine["version"] == machine.tensorrt
    assert engine["gpu"]["compute_capability"] == machine.compute_capability
    assert engine["dla_cores"] == machine.dla_cores
    assert facts["jetpack"] == machine.jetpack
    assert facts["python_executable"] == interpreter(machine.python)


def test_each_board_builds_what_it_can(on_jetsons, jetway_here, switch_on, cli_home):
    run = on_jetsons("run", XAVIER, ORIN, SERVER)
    rows = finished(run)
    assert len(rows) == 9
    assert all(row["simulated"] and row["board"].startswith("SIMULATED") for row in rows.values())
    assert all(row["metrics"]["latency_ms_p50"] > 0 for row in rows.values())
    for key, passport in passports(cli_home, run).items():
        assert passport["simulated"]
        assert passport["flags"] == FLAGS.get(key, [])
        assert passport["platform"]["engine_version"] == switch_on(key[0]).machine.tensorrt
    tracker = Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")
    record = tracker.run(run.json["run_id"])
    assert {f"package.{name}" for name in (XAVIER, ORIN, SERVER)} <= set(record.tags)
    # The one Python with ONNX Runtime, on which the double can compute.
    host = record.metrics["load.top1"]
    assert rows[SERVER, "baseline-fp32"]["metrics"]["top1"] == pytest.approx(host, abs=1e-9)
    assert all(one.name.endswith("(simulated)") for one in (record, *tracker.children(record.run_id)))
    assert "simulated" in jetway_here("show", run.json["run_id"][:12], cwd=cli_home).stdout.lower()


@pytest.mark.parametrize(
    ("name", "mode"), [(XAVIER, "MODE_15W_6CORE"), pytest.param(SERVER, None, marks=pytest.mark.slow)]
)
def test_every_pass_of_the_benchmark(on_jetsons, switch_on, name, mode):
    """In a power mode of its own and with locked clocks, which are put back."""
    asked = {name: {"power_mode": mode, "lock_clocks": True}} if mode else {}
    run = on_jetsons("run", name, target_changes=asked, benchmark=EVERYTHING, variants=["baseline-fp32"])
    metrics = finished(run)[name, "baseline-fp32"]["metrics"]
    for figure in (
        "power_w_mean",
        "energy_mj_per_inference",
        "in_flight_samples_per_s",
        "trtexec_gpu_compute_ratio",
    ):
        assert metrics[figure] > 0, sorted(metrics)
    if mode:
        board = switch_on(name).installation.board
        before, chosen = board.kind["modes"]
        assert chosen["name"] == mode
        assert f"nvpmodel -m {chosen['id']}" in board.commands()
        assert board.mode == before["id"]


def test_a_nano_does_without_int8(on_jetsons, cli_home):
    variants = ["baseline-fp32", "baseline-fp16"]
    run = on_jetsons("run", NANO, variants=variants)
    assert [variant for _, variant in finished(run)] == variants
    for key, passport in passports(cli_home, run).items():
        assert passport["flags"] == FLAGS.get(key, [])


def test_int8_on_a_nano_is_refused_before_anything_is_trained(on_jetsons):
    run = on_jetsons("check", NANO)
    assert run.exit_code == 3
    assert "variants: pruned-int8-ptq" in run.stderr + run.stdout
    assert "no int8 kernels" in run.stderr + run.stdout


@pytest.mark.slow
def test_a_run_survives_what_befalls_its_boards(on_jetsons, switch_on, fault, when, cli_home):
    """At once: a board throttles, a link drops and a board reboots in the middle of a build, memory is short."""
    nano, xavier, orin = (switch_on(name) for name in (NANO, XAVIER, ORIN))
    before = {jetson.name: built(jetson) for jetson in (xavier, orin)}
    alarm = "[  512.000000] soctherm: OC ALARM 0x00000001"
    when(lambda: "round" in nano.progress(), lambda: nano.installation.board.configure(kernel_log=[alarm]))
    for jetson, blow in ((xavier, xavier.drop_connections), (orin, orin.reboot)):
        fault(jetson.name, "slow_build:2")
        when(lambda jetson=jetson: built(jetson) > before[jetson.name], blow)
    fault(SERVER, "out_of_memory_above:300")
    changes = {
        "build": {"revision": 2},
        "tensorrt": {"workspace_mib": [512, 256], "timing_cache": False},
        # Long enough for the alarm to come in the middle.
        "benchmark": {"warmup_runs": 2, "min_queries": 30, "min_duration_s": 2.0, "max_extensions": 1},
    }
    run = on_jetsons("run", NANO, XAVIER, ORIN, SERVER, variants=["baseline-fp32"], **changes)
    rows = finished(run)
    assert run.exit_code == 5
    assert any("over-current" in reason for reason in rows[NANO, "baseline-fp32"]["validity"]["reasons"])
    stages = [stage["name"] for stage in run.json["stages"]]
    assert stages.count(f"build baseline-fp32 on {XAVIER}") == 1, "it attached again, and did not try again"
    assert built(xavier) - before[XAVIER] == 1
    assert built(orin) - before[ORIN] == 2
    ladder = passports(cli_home, run)[SERVER, "baseline-fp32"]["ladder"]
    assert [(rung["workspace_mib"], rung["outcome"]) for rung in ladder] == [
        (512, "out_of_memory"),
        (256, "built"),
    ]


def test_a_build_without_memory_on_any_rung_names_its_cause(on_jetsons, fault):
    fault(SERVER, "out_of_memory_above:1")
    run = on_jetsons("run", SERVER, variants=["baseline-fp32"], build={"revision": 3})
    assert run.exit_code == 3
    assert "512 MiB out_of_memory, 256 MiB out_of_memory, 128 MiB out_of_memory" in run.stderr


class Images(Workload):
    """What the small networks of the doubles take."""

    output_names = ("logits",)
    labels = tuple(f"digit {number}" for number in range(10))

    def network(self):
        return torch.nn.Flatten()

    def example_inputs(self):
        return {"image": torch.zeros(1, 1, 8, 8)}

    def evaluation_data(self):
        return [({"image": torch.zeros(1, 8, 8)}, 0)]

    train_data = calibration_data = evaluation_data

    def frame_processing(self):
        return FrameProcessing(
            input=FrameInput(name="image", size=(8, 8), colour="gray"), results=Classes(output="logits")
        )

    def loss(self, outputs, target):
        return outputs["logits"].sum()


@pytest.fixture
def context(tmp_path):
    return StageContext(Images(), Store(tmp_path / "store"), seed=5, threads=1)


@pytest.fixture
def build_on(context, switch_on, tmp_path):
    """Builds a small network on a fake, and gives its engine's handle."""
    path = Path(networks.write_networks(tmp_path)["fp32"])
    onnx = context.store.add(OnnxModel, path, metadata={"opset": 17, "precision": "fp32"})

    def build(name):
        target = Target.model_validate(switch_on(name).target_values())
        with open_target(target) as session:
            return build_engine(
                context, session, onnx, BuildConfig(), TensorRtConfig(), backend=target.own_backend
            )

    return build


def measure(context, jetson, engine):
    config = BenchmarkConfig(min_duration_s=0.05, min_queries=10, telemetry=False)
    with open_target(Target.model_validate(jetson.target_values())) as session:
        return benchmark_engines(context, session, {"baseline-fp32": engine}, config)


@pytest.mark.parametrize("name", [NANO, ORIN, SERVER])
def test_a_tensorrt_engine_is_packaged_and_runs_from_the_package(context, build_on, switch_on, name):
    """On each board's own Python, which has no numpy."""
    engine, jetson = build_on(name), switch_on(name)
    onnx = OnnxModel(sha256=engine.parents[0], size_bytes=0)
    with open_target(Target.model_validate(jetson.target_values())) as session:
        package = package_winner(context, session, engine, onnx, variant="baseline-fp32").handle
        archive = context.store.open(package)
        with unpacked(session, archive) as folder:
            shown = run_script(session, folder, "infer.py").text
            assert "logits float32[1, 10]:" in shown
            assert "label: digit" in shown
            assert "latency of 3 runs" in run_script(session, folder, "benchmark.sh", "3").text
            spoil = ["sh", "-c", 'echo 1 >> "$1/model.engine"', "sh", folder]
            session.connection.run(spoil, timeout_s=10)
            with pytest.raises(RemoteCommandError, match=r"exit status 2: model\.engine is corrupt"):
                run_script(session, folder, "infer.py", "--check")
    with zipfile.ZipFile(archive) as files:
        readme = files.read("README.md").decode()
        assert f"by TensorRT {jetson.machine.tensorrt}" in readme
        passport = json.loads(files.read("passport.json"))
        assert files.getinfo("deepstream/run.sh").external_attr >> 16 & 0o111
        assert "labelfile-path=../labels.txt" in files.read("deepstream/config_infer_primary.txt").decode()
    assert passport["platform"]["double"]
    assert "| `deepstream` |" in readme


def test_a_package_of_another_board_is_refused(context, build_on, switch_on):
    engine = build_on(XAVIER)
    onnx = OnnxModel(sha256=engine.parents[0], size_bytes=0)
    with (
        open_target(Target.model_validate(switch_on(ORIN).target_values())) as session,
        pytest.raises(RemoteCommandError, match=r"engine_version is 10\.3\.0 here and was 8\.5\.2\.2 there"),
    ):
        package_winner(context, session, engine, onnx)


def test_a_corrupt_engine_is_not_loaded(context, build_on, switch_on):
    engine = build_on(ORIN)
    with open(engine.metadata["remote_path"], "r+b") as file:
        file.seek(40)
        file.write(b"another byte")
    with pytest.raises(ArtifactError, match="is corrupt"):
        measure(context, switch_on(ORIN), engine)


def test_an_engine_of_another_board_is_not_loaded(context, build_on, switch_on):
    engine = build_on(XAVIER)
    with pytest.raises(TargetMismatchError) as refused:
        measure(context, switch_on(ORIN), engine)
    for difference in ("board is NVIDIA Jetson Orin", "engine_version is 10.3.0 here and was 8.5.2.2 there"):
        assert difference in str(refused.value)
