"""Power modes and locked clocks, with real processes on fake boards."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from jetway.tasks.on_device import errors, power_mode
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry import clocks
from jetway.tasks.target.agent import build_agent

NOBODY = 65534
OLD_PYTHONS = [
    path
    for version in ("3.6", "3.8", "3.10", "3.12")
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
]

HOLD = """
import sys, time
from jetway.tasks.on_device import power_mode
with power_mode.held(".", sys.argv[1] or None, sys.argv[2] == "lock") as report:
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return str(folder)


def gpu_clocks(board):
    return [int(board.read(f"{board.gpu}/{part}_freq")) // 1_000_000 for part in ("min", "max")]


def changes(board):
    """The commands that change something."""
    return [
        line for line in board.commands() if line.split()[1] in ("-m", "--restore") or line == "jetson_clocks"
    ]


@pytest.mark.parametrize(
    ("name", "current", "modes"),
    [
        ("Nano JP4.6", "MAXN", {"MAXN": 0, "5W": 1}),
        ("Xavier NX JP5.1", "MODE_20W_6CORE", {"MODE_20W_6CORE": 8, "MODE_15W_6CORE": 2}),
        ("Orin Nano JP6.2", "15W", {"15W": 0, "MAXN_SUPER": 2, "7W": 3}),
        ("AGX Thor JP7.2", "MAXN", {"MAXN": 0, "120W": 1}),
    ],
)
def test_modes_go_by_name(board, name, current, modes):
    board(name)
    assert power_mode.current() == current
    assert power_mode.modes() == modes
    assert power_mode.facts()["power_modes"] == list(modes)


SHAPES = [
    ("NV Power Mode: MAXN\n0\n", "MAXN"),
    ("NV Fan Mode:quiet\nNV Power Mode: MODE_30W_ALL\n3\nNVPM ERROR: Error opening /sys/x: 13\n", "MODE_30W_ALL"),
    ("NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER"),
    ("NVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE\n2\nNVPM VERB: PARAM CPU_ONLINE\n", "MODE_15W_6CORE"),
    ("NV Power Mode: 15W\n0\n", "15W"),
    ("NVPM ERROR: failed to query\n", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), SHAPES)
def test_each_shape_of_the_answer(board, text, name):
    made = board("Nano JP4.6")
    script = made.root / "bin/nvpmodel"
    script.write_text(f"#!/bin/sh\nprintf '{text}'\n")
    assert power_mode.current() == name


def test_modes_come_from_the_config_where_the_program_lists_none(board):
    made = board("Nano JP4.6")
    (made.root / "bin/nvpmodel").write_text("#!/bin/sh\nexit 255\n")
    made.write(
        "/etc/nvpmodel.conf",
        "# x\n< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=12 NAME=MODE_30W_2CORE >\n",
    )
    assert power_mode.modes() == {"MAXN": 0, "MODE_30W_2CORE": 12}


def test_a_machine_without_nvpmodel_has_no_modes():
    assert power_mode.modes() == {}
    assert power_mode.current() is None
    assert power_mode.facts()["power_modes"] == []


def test_a_mode_is_set_and_put_back(board, work_dir):
    made = board("Xavier NX JP5.1")
    made.write(f"{made.gpu}/min_freq", 765_000_000)  # someone had chosen it
    with power_mode.held(work_dir, "MODE_15W_6CORE", False) as report:
        assert made.mode == 2
        assert gpu_clocks(made) == [150, 600]
        assert report["before"] == "MODE_20W_6CORE"
        assert report["during"] == "MODE_15W_6CORE"
    assert made.mode == 8
    assert gpu_clocks(made) == [765, 1300]
    assert report["restored"] is True
    assert os.path.getsize(os.path.join(work_dir, power_mode.STATE)) == 0


def test_clocks_are_locked_and_put_back(board, work_dir):
    made = board("Orin Nano JP6.2")
    before = clocks.limits()
    with power_mode.held(work_dir, "MAXN_SUPER", True) as report:
        assert gpu_clocks(made) == [1300, 1300]
        assert clocks.unlocked(clocks.limits()) == []
        assert report["clock_limits"]["gpu"]["min_mhz"] == 1300.0
    assert clocks.limits() == before
    assert made.mode == 0


def test_nothing_is_run_as_root_where_nothing_has_to_change(board, work_dir):
    made = board("Nano JP4.6")
    with power_mode.held(work_dir, "MAXN", False) as report:
        pass
    assert report["during"] == "MAXN"
    assert report["restored"] is True
    subprocess.run(["jetson_clocks"], check=True)
    before = len(made.commands())
    with power_mode.held(work_dir, "MAXN", True):
        pass
    assert [line.split()[0] for line in made.commands()[before:]].count("jetson_clocks") == 0
    assert gpu_clocks(made) == [1300, 1300]


def test_an_error_in_the_body_puts_the_board_back(board, work_dir):
    made = board("Nano JP4.6")
    with pytest.raises(ZeroDivisionError), power_mode.held(work_dir, "5W", True):
        raise ZeroDivisionError
    assert made.mode == 0
    assert gpu_clocks(made) == [325, 1300]


@pytest.mark.parametrize("name", ["maxn", "0", "MAXN_SUPER"])
def test_a_mode_that_the_board_lacks_is_refused_with_those_it_has(board, work_dir, name):
    made = board("Nano JP4.6")
    words = r"no power mode .* one of: 5W, MAXN"
    with pytest.raises(DeviceError, match=words) as caught, power_mode.held(work_dir, name, False):
        pass
    assert caught.value.kind == errors.BAD_REQUEST
    assert changes(made) == []


def test_a_mode_on_a_machine_without_nvpmodel_is_refused(work_dir):
    with pytest.raises(DeviceError, match="no nvpmodel"), power_mode.held(work_dir, "MAXN", False):
        pass


def test_a_mode_that_needs_a_reboot_is_answered_with_no(board, work_dir):
    made = board("Orin Nano JP6.2")
    words = r"7W needs a reboot .* `sudo nvpmodel -m 3`"
    with pytest.raises(DeviceError, match=words), power_mode.held(work_dir, "7W", False):
        pass
    assert "answer NO" in made.commands()
    assert made.mode == 0
    assert os.path.getsize(os.path.join(work_dir, power_mode.STATE)) == 0


def test_a_mode_that_does_not_take_is_an_error(board, work_dir, monkeypatch):
    monkeypatch.setattr(power_mode, "SETTLE_S", 0.2)
    board("Nano JP4.6").configure(ignores_modes=True)
    with (
        pytest.raises(DeviceError, match="did not set 5W: MAXN is set"),
        power_mode.held(work_dir, "5W", False),
    ):
        pass


def test_clocks_that_do_not_lock_are_an_error(board, work_dir, monkeypatch):
    monkeypatch.setattr(power_mode, "SETTLE_S", 0.2)
    made = board("Nano JP4.6")
    made.configure(ignores_clocks=True)
    with (
        pytest.raises(DeviceError, match="did not lock the clock of: gpu"),
        power_mode.held(work_dir, None, True),
    ):
        pass


def test_a_board_that_cannot_be_put_back_says_so_and_it_is_tried_again(board, work_dir, monkeypatch, capfd):
    monkeypatch.setattr(power_mode, "SETTLE_S", 0.2)
    made = board("Nano JP4.6")
    with power_mode.held(work_dir, "5W", False) as report:
        made.configure(ignores_modes=True)
    assert "did not set MAXN: 5W is set" in report["restored"]
    assert "did not set MAXN" in capfd.readouterr().err
    made.configure(ignores_modes=False)
    power_mode.recover(work_dir)
    assert made.mode == 0


def hold(board, work_dir, *arguments):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments],
        cwd=work_dir,
        env=os.environ | board.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    return owner


def kill(owner):
    owner.send_signal(signal.SIGKILL)
    owner.communicate()


def test_a_killed_owner_is_noticed_and_the_board_put_back(board, work_dir):
    made = board("Xavier NX JP5.1")
    owner = hold(made, work_dir, "MODE_15W_6CORE", "lock")
    power_mode.recover(work_dir)  # its owner lives: nothing is touched
    assert made.mode == 2
    assert gpu_clocks(made) == [600, 600]
    kill(owner)
    assert made.mode == 2
    power_mode.recover(work_dir)
    assert made.mode == 8
    assert gpu_clocks(made) == [325, 1300]
    count = len(made.commands())
    power_mode.recover(work_dir)
    assert len(made.commands()) == count


def test_the_next_job_puts_back_what_a_dead_one_left(board, work_dir):
    made = board("Nano JP4.6")
    kill(hold(made, work_dir, "5W", "lock"))
    with power_mode.held(work_dir, "MAXN", False) as report:
        assert report["before"] == "MAXN"
        assert gpu_clocks(made) == [325, 1300]
    assert made.mode == 0


def test_two_jobs_do_not_set_modes_at_once(board, work_dir):
    made = board("Nano JP4.6")
    owner = hold(made, work_dir, "5W", "")
    with pytest.raises(DeviceError, match="Another job") as caught, power_mode.held(work_dir, "MAXN", False):
        pass
    assert caught.value.kind == errors.BUSY
    assert made.mode == 1
    kill(owner)
    power_mode.recover(work_dir)


def test_after_a_reboot_the_mode_is_put_back_and_the_clocks_are_already(board, work_dir):
    made = board("Nano JP4.6")
    kill(hold(made, work_dir, "5W", "lock"))
    made.write("/proc/sys/kernel/random/boot_id", "another boot")
    power_mode.recover(work_dir)
    assert made.mode == 0
    assert not any("--restore" in line for line in made.commands())


def test_a_state_that_was_cut_short_changed_nothing(board, work_dir):
    made = board("Nano JP4.6")
    with open(os.path.join(work_dir, power_mode.STATE), "w") as file:
        file.write('{"boot_id": "6c1b')
    power_mode.recover(work_dir)
    assert changes(made) == []


def test_before_and_after_a_job_the_board_is_as_it_was(board, work_dir):
    made = board("Nano JP4.6")
    kill(hold(made, work_dir, "5W", ""))
    with power_mode.left_as_found(work_dir):
        assert made.mode == 0
        kill(hold(made, work_dir, "5W", ""))
        assert made.mode == 1
    assert made.mode == 0


AS_USER = """
import getpass, json, os, subprocess
from jetway.tasks.on_device import errors, power_mode
if os.geteuid() == 0:
    os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
foreseen = power_mode.root_problem("5W", True)
try:
    with power_mode.held(".", "5W", True) as report:
        during = power_mode.current()
    print(json.dumps([during, report["restored"], foreseen]))
except errors.DeviceError as exc:
    assert foreseen.split(" needs root")[1] == str(exc).split(" needs root")[1]
    print(json.dumps(str(exc)))
"""


def as_user(board, folder):
    """As one who is not root, whom the fake board's files belong to."""
    if os.geteuid() == 0:
        for path in (board.root, *board.root.rglob("*"), folder):
            os.chown(path, NOBODY, NOBODY)
        for parent in itertools.takewhile(
            lambda path: path != Path(tempfile.gettempdir()), (folder, *folder.parents)
        ):
            parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_USER.format(nobody=NOBODY)],
        cwd=folder,
        env=os.environ | board.environment | {"LOGNAME": "jetson"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def users_folder(tmp_path):
    folder = tmp_path / "users"
    folder.mkdir()
    return folder


def test_a_user_goes_through_sudo_without_a_password(board, users_folder):
    made = board("Nano JP4.6")
    assert as_user(made, users_folder) == ["5W", True, None]
    assert "sudo -n nvpmodel -m 1" in made.commands()
    assert "sudo -n jetson_clocks" in made.commands()
    assert made.mode == 0


def test_sudo_that_asks_for_a_password_is_named_with_the_line_to_add(board, users_folder):
    made = board("Nano JP4.6")
    made.configure(passwordless_sudo=False)
    message = as_user(made, users_folder)
    paths = ", ".join(str(made.root / "bin" / name) for name in ("nvpmodel", "jetson_clocks"))
    assert f"jetson ALL=(root) NOPASSWD: {paths}" in message
    assert "sudo visudo -f /etc/sudoers.d/jetway" in message
    assert made.mode == 0


@pytest.mark.parametrize(
    ("name", "asked", "problem"),
    [
        ("Nano JP4.6", (None, False), None),
        ("Nano JP4.6", ("MAXN", False), None),
        ("Nano JP4.6", ("5W", True), None),
        ("Nano JP4.6", ("12W", False), "no power mode '12W'"),
    ],
)
def test_what_could_be_set_is_asked_without_setting_it(board, name, asked, problem):
    made = board(name)
    mode, limits = power_mode.current(), clocks.limits()
    found = power_mode.root_problem(*asked)
    assert (found is None) if problem is None else (problem in found)
    assert (power_mode.current(), clocks.limits()) == (mode, limits)
    assert not any(line.startswith(("nvpmodel -m", "jetson_clocks --store")) for line in made.commands())


def test_clocks_that_nothing_can_lock_are_a_problem_at_once(board, monkeypatch, tmp_path):
    board("Nano JP4.6")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "jetson_clocks is not on this machine" in power_mode.root_problem(None, True)


def test_clocks_that_cannot_be_read_are_not_called_locked(monkeypatch, tmp_path):
    monkeypatch.setenv("JETWAY_SIMULATED_ROOT", str(tmp_path))
    with pytest.raises(DeviceError, match="lock_clocks to false"), power_mode.held(str(tmp_path), None, True):
        pass


def test_a_slow_command_is_waited_for(board, work_dir):
    made = board("Nano JP4.6")
    made.configure(slow_s=0.5)
    started = time.monotonic()
    with power_mode.held(work_dir, "5W", False):
        assert made.mode == 1
    assert time.monotonic() - started > 1.0


HOLDING_VERB = """
import time
from jetway.tasks.on_device import power_mode


def run(request, progress):
    with power_mode.held(request["work_dir"], request["mode"], True):
        progress({"text": "held"})
        time.sleep(request["seconds"])
    return {}
"""


@pytest.fixture
def follow(work_dir):
    """Starts a job of the real agent that holds a power mode, and reads what it streams."""
    agent = os.path.join(work_dir, "agent.pyz")
    with open(agent, "wb") as file:
        file.write(build_agent())
    with zipfile.ZipFile(agent, "a") as archive:
        archive.writestr("jetway/tasks/on_device/holding.py", HOLDING_VERB)
    processes = []

    def start(board, name, mode, seconds, python=sys.executable):
        spec = {
            "schema_version": 1, "verb": "holding", "work_dir": work_dir, "job": name, "engine": "onnxruntime",
            "request": {"mode": mode, "seconds": seconds}, "lease": True, "started": False, "timeout_s": 60,
            "busy_timeout_s": 60, "orphan_grace_s": 20, "offset": 0,
        }  # fmt: skip
        text = json.dumps(spec).encode()
        job = subprocess.Popen(
            [python, agent, "follow", name, str(len(text))],
            env=os.environ | board.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        processes.append(job)
        job.stdin.write(text)
        job.stdin.flush()
        return job

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def read_until(job, key):
    for line in job.stdout:
        record = json.loads(line.lstrip(b"\x1e"))
        if key in record:
            return record[key]
    raise AssertionError("the job ended")


def end(job):
    job.stdin.write(b"e")
    job.stdin.flush()
    job.wait(timeout=30)


def worker_of(work_dir, name):
    """The supervisor's only child."""
    with open(os.path.join(work_dir, "jobs", name, "pid")) as file:
        supervisor = file.read()
    with open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
        return int(file.read().split()[0]), int(supervisor)


@pytest.mark.serial
@pytest.mark.parametrize("who", ["worker", "host"])
def test_the_supervisor_puts_the_board_back_when_the_job_dies(board, work_dir, follow, who):
    made = board("Nano JP4.6")
    job = follow(made, "dies", "5W", 60)
    read_until(job, "progress")
    assert made.mode == 1
    assert gpu_clocks(made) == [600, 600]
    if who == "worker":
        os.kill(worker_of(work_dir, "dies")[0], signal.SIGKILL)
        assert "killed" in read_until(job, "error")["message"]
    end(job)
    assert made.mode == 0
    assert gpu_clocks(made) == [325, 1300]


@pytest.mark.serial
def test_the_next_job_puts_the_board_back_when_the_supervisor_was_killed_too(board, work_dir, follow):
    made = board("Nano JP4.6")
    job = follow(made, "dies", "5W", 60)
    read_until(job, "progress")
    os.kill(worker_of(work_dir, "dies")[1], signal.SIGKILL)
    assert read_until(job, "gone") == "died"
    assert made.mode == 1
    following = follow(made, "next", "MAXN", 0)
    read_until(following, "result")
    end(following)
    assert made.mode == 0
    assert gpu_clocks(made) == [325, 1300]


@pytest.mark.serial
@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: path.parent.parent.name)
def test_on_every_python(board, work_dir, follow, python):
    made = board("Xavier NX JP5.1")
    job = follow(made, "old", "MODE_15W_6CORE", 0, python)
    assert read_until(job, "result") == {}
    end(job)
    assert "nvpmodel -m 2" in made.commands()
    assert made.mode == 8
    assert gpu_clocks(made) == [325, 1300]
