"""What the host is told of a machine and of an engine's file, before it judges them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from jetway.tasks.on_device import checkup, engine_file, lease, passport
from jetway.tasks.target.agent import build_agent

OLD_PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python"))
IN_OLD_PYTHON = """
import json, sys
sys.path.insert(0, sys.argv[1])
from jetway.tasks.on_device import checkup, engine_file, soak
from jetway.tasks.on_device.telemetry.sampler import Sampler
with Sampler(".", 20) as sampler:
    window = soak.run_window(lambda: sum(range(100)), 200 * 1000 * 1000)
window.update(soak.sensed(sampler.series, window))
print(json.dumps({
    "state": checkup.run({"engine": "tensorrt", "work_dir": "."}, print),
    "file": engine_file.run({"path": "no/such.engine"}, print),
    "window": window,
}))
"""


def test_this_machine_tells_its_state(workplace):
    state = json.loads(json.dumps(checkup.run({"engine": "onnxruntime", "work_dir": "/no/such"}, print)))
    assert 0 < state["memory_mib"]["available"] <= state["memory_mib"]["total"]
    assert state["free_disk_mib"] > 0
    assert state["lease"]["problem"] == ""
    assert state["sensors"]["memory_used_mib"] > 0
    assert state["power"].keys() >= {"power_modes", "power_mode"}
    assert state["simulated"] is False


def test_the_holder_of_the_lease_is_told(workplace, monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "directory", lambda: str(tmp_path))
    with lease.held("cpu", "job7", 1, lambda seconds, holder: None):
        assert checkup.lease_state("onnxruntime")["holder"]["job"] == "job7"
    assert checkup.lease_state("onnxruntime") == {"problem": "", "holder": None}


def test_a_machine_without_a_shared_folder_says_so(workplace, monkeypatch):
    monkeypatch.setattr(lease, "PLACES", ("/no/such/folder",))
    assert "/no/such/folder" in checkup.lease_state("onnxruntime")["problem"]


def test_sensors_and_cameras_are_read_where_they_are(workplace, monkeypatch, tmp_path):
    monkeypatch.setenv("JETWAY_SIMULATED_ROOT", str(tmp_path))
    for path, text in {
        "sys/class/thermal/thermal_zone0/type": "GPU-therm",
        "sys/class/thermal/thermal_zone0/temp": "41500",
        "sys/class/video4linux/video0/name": "vi-output, imx219 7-0010",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "2",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    state = checkup.run({"engine": "onnxruntime", "work_dir": "."}, print)
    assert state["sensors"]["temperature_c.GPU-therm"] == 41.5
    assert state["cameras"] == ["vi-output, imx219 7-0010"]
    assert state["over_current_events"] == {"oc1": 2}
    assert state["simulated"] is True


@pytest.fixture
def engine(workplace, networks):
    return workplace.build(networks["conv"], workplace.images(1))


def test_an_engine_file_is_described_with_its_passport(engine):
    found = engine_file.run({"path": engine["engine"]}, print)
    assert found["sha256"] == engine["passport"]["engine_sha256"]
    assert found["size_bytes"] == os.path.getsize(engine["engine"])
    assert found["passport"] == engine["passport"]
    assert found["platform"] == engine["passport"]["platform"]


def test_a_file_that_is_gone_has_no_digest(engine):
    os.unlink(engine["engine"])
    os.unlink(passport.passport_path(engine["engine"]))
    assert engine_file.run({"path": engine["engine"]}, print) == {
        "sha256": None, "size_bytes": None, "passport": None, "platform": None, "reason": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "reason"),
    [({"engine": "no such engine"}, "no engine 'no such engine'"), ({}, "the passport lacks 'engine'")],
)
def test_a_passport_that_names_no_engine_of_ours_says_why(engine, platform, reason):
    passport.write(engine["engine"], dict(engine["passport"], platform=platform))
    found = engine_file.run({"path": engine["engine"]}, print)
    assert found["platform"] is None
    assert reason in found["reason"]


@pytest.mark.skipif(not OLD_PYTHONS, reason="needs Python 3.6, from pyenv")
def test_the_oldest_python_does_the_same(tmp_path):
    (tmp_path / "agent").write_bytes(build_agent())
    done = subprocess.run(
        [OLD_PYTHONS[0], "-c", IN_OLD_PYTHON, tmp_path / "agent"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"]["memory_mib"]["total"] > 0
    assert told["file"]["sha256"] is None
    assert told["window"]["memory_used_mib"] > 0
    assert told["window"]["queries"] > 100
