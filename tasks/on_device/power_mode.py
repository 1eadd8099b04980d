"""The power mode (nvpmodel) and locked clocks (jetson_clocks) of a Jetson, set for a measurement and put back.

Modes go by name: the same id is another mode on another board. What was there before is written to a file in the work
folder first, which stays locked for as long as the process that changed it lives. A file that is not locked was left by
one that died, and whoever finds it puts the board back: the job's supervisor, or the next job.
"""

import contextlib
import fcntl
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List, Optional

from jetway.tasks.on_device import errors, lease, machine
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry import clocks

CONFIG = "/etc/nvpmodel.conf"
STATE = "power_state.json"
#: What ``jetson_clocks --store`` wrote.
STORED_CLOCKS = "power_state.clocks"
COMMAND_TIMEOUT_S = 60.0
#: How long clocks may take to follow.
SETTLE_S = 3.0
POLL_S = 0.1

MODE = re.compile(r"POWER_MODEL:?\s+ID=(\d+)\s+NAME=(\S+)")
CURRENT = re.compile(r"NV Power Mode:\s*(\S+)")
REBOOT = re.compile(r"reboot", re.IGNORECASE)
REFUSED = re.compile(
    r"(?:password|terminal) is required|not in the sudoers|not allowed to execute|may not run"
)

Json = Dict[str, Any]


def is_here() -> bool:
    return shutil.which("nvpmodel") is not None


def modes() -> Dict[str, int]:
    """Ids by name, as this board has them; none where it has no nvpmodel."""
    text = _output(["nvpmodel", "-p", "--verbose"]) if is_here() else ""
    found = MODE.findall(text) or MODE.findall(machine.read_text(CONFIG) or "")
    return {name: int(number) for number, name in found}


def current() -> Optional[str]:
    """The name of the mode that is set; None where there is none to read. Needs no root."""
    found = CURRENT.search(_output(["nvpmodel", "-q"])) if is_here() else None
    return found.group(1) if found else None


def facts() -> Json:
    """For the probe."""
    return {
        "power_modes": list(modes()),
        "power_mode": current(),
        "clock_limits": clocks.limits(),
    }


def root_problem(mode: Optional[str], lock_clocks: bool) -> Optional[str]:
    """What keeps this user from setting the board so, in words; None where nothing does. Runs only what asks."""
    try:
        change = _needed_change(mode, lock_clocks)
        if "mode" in change:
            _as_root(["nvpmodel", "-q"])
        if change and (change.get("lock_clocks") or shutil.which("jetson_clocks") is not None):
            _as_root(["jetson_clocks", "--show"])
    except DeviceError as exc:
        return str(exc)
    return None


@contextlib.contextmanager
def held(work_dir: str, mode: Optional[str], lock_clocks: bool) -> Iterator[Json]:
    """The board in that mode, with its clocks locked where asked, in the body; afterwards as it was before.

    Yields what was asked, found and set, for the result; ``restored`` in it is true once the board is back, or says
    what is in the way. Raises DeviceError where the board cannot be set so, and leaves it as it was.
    """
    if mode is None and not lock_clocks:
        yield {
            "asked": None,
            "lock_clocks": False,
            "before": current(),
            "during": current(),
            "restored": True,
        }
        return
    with State(work_dir).owned() as state:
        state.restore()
        report = {"asked": mode, "before": current(), "lock_clocks": lock_clocks}  # type: Json
        change = _needed_change(mode, lock_clocks)
        try:
            if change:
                state.record()
                _apply(change)
            report.update(during=current(), clock_limits=clocks.limits())
            yield report
        finally:
            report["restored"] = _restored(state)


@contextlib.contextmanager
def left_as_found(work_dir: str) -> Iterator[None]:
    """Puts the board back where a process died that had changed it, before the body and after."""
    recover(work_dir)
    try:
        yield
    finally:
        recover(work_dir)


def recover(work_dir: str) -> None:
    """Puts the board back unless the process that changed it lives. What fails is logged, and tried again next time."""
    if not os.path.exists(os.path.join(work_dir, STATE)):
        return
    try:
        with State(work_dir).owned() as state:
            state.restore()
    except DeviceError as exc:
        sys.stderr.write("{}\n".format(exc))


class State:
    """What the board was like, in a file that is empty when there is nothing to put back."""

    def __init__(self, work_dir: str) -> None:
        self.path = os.path.join(work_dir, STATE)
        self.clocks_path = os.path.join(work_dir, STORED_CLOCKS)
        self._file = -1

    @contextlib.contextmanager
    def owned(self) -> Iterator["State"]:
        """Locks the file. Raises DeviceError (busy) where another process has it."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield self
        except BlockingIOError:
            raise DeviceError(
                "Another job has set the power mode of this board. Wait until it has ended.", errors.BUSY
            )
        finally:
            os.close(self._file)

    def record(self) -> None:
        """Notes what there is, on the disk before anything is changed."""
        _remove(self.clocks_path)
        known = {"boot_id": lease.boot_id(), "mode": current(), "limits": _accelerator_limits()}
        if shutil.which("jetson_clocks") is not None:
            self._store_clocks()
        self._write(json.dumps(known).encode("utf-8"))

    def _store_clocks(self) -> None:
        output = _as_root(["jetson_clocks", "--store", self.clocks_path])
        if not os.path.exists(self.clocks_path):
            raise DeviceError(
                "jetson_clocks did not store the clocks, so nothing was changed: " + output[-500:]
            )

    def restore(self) -> None:
        """Puts back what was noted, if anything was. Raises DeviceError where that fails; it stays noted."""
        known = self._read()
        if known is None:
            return
        if known["mode"] is not None and known["mode"] != current():
            _set_mode(known["mode"])
        if os.path.exists(self.clocks_path) and known["boot_id"] == lease.boot_id():
            self._restore_clocks(known["limits"])
        self._write(b"")
        _remove(self.clocks_path)

    def _restore_clocks(self, limits: Json) -> None:
        output = _as_root(["jetson_clocks", "--restore", self.clocks_path])
        if not _soon(lambda: _accelerator_limits() == limits):
            raise DeviceError("jetson_clocks did not restore the clocks of before: " + output[-500:])

    def _read(self) -> Optional[Json]:
        """A file that was cut short was written before anything was changed."""
        try:
            known = json.loads(os.pread(self._file, 65536, 0).decode("utf-8"))
        except ValueError:
            return None
        return known if isinstance(known, dict) else None

    def _write(self, text: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)
        os.fsync(self._file)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def _needed_change(mode: Optional[str], lock_clocks: bool) -> Json:
    """What has to be done; empty where the board is like that already, which needs no root."""
    change = {}  # type: Json
    if mode is not None and _known(mode) != current():
        change["mode"] = mode
    if lock_clocks and (change or clocks.unlocked(_readable_limits())):
        change["lock_clocks"] = True
    return change


def _readable_limits() -> Dict[str, clocks.Limits]:
    found = _accelerator_limits()
    if not found:
        raise DeviceError(
            "No clock of this machine can be read, so none can be locked. Set lock_clocks to false.",
            errors.BAD_REQUEST,
        )
    return found


def _known(mode: str) -> str:
    """The mode's name, if this board has it."""
    found = modes()
    if mode not in found:
        raise DeviceError(
            "This board has no power mode {!r}. Set power_mode to one of: {}.".format(
                mode, ", ".join(sorted(found)) or "none, as it has no nvpmodel; leave power_mode away"
            ),
            errors.BAD_REQUEST,
        )
    return mode


def _apply(change: Json) -> None:
    if "mode" in change:
        _set_mode(change["mode"])
    if change.get("lock_clocks"):
        _lock_clocks()


def _set_mode(name: str) -> None:
    number = modes()[_known(name)]
    output = _as_root(["nvpmodel", "-m", str(number)], answer="NO\n")
    if REBOOT.search(output) and current() != name:
        raise DeviceError(
            "The power mode {0} needs a reboot of this board, which was answered with no. Run `sudo nvpmodel -m {1}` "
            "on it yourself, let it reboot, and run again; or choose another mode.".format(name, number),
            errors.BAD_REQUEST,
        )
    if not _soon(lambda: current() == name):
        text = "nvpmodel did not set {}: {} is set. It said: {}"
        raise DeviceError(text.format(name, current(), output[-500:]))


def _lock_clocks() -> None:
    if shutil.which("jetson_clocks") is None:
        raise DeviceError("This machine has no jetson_clocks. Set lock_clocks to false.", errors.BAD_REQUEST)
    _as_root(["jetson_clocks"])
    if not _soon(lambda: not clocks.unlocked(_accelerator_limits())):
        moving = ", ".join(clocks.unlocked(_accelerator_limits()))
        raise DeviceError(
            "jetson_clocks did not lock the clock of: {}. Look at it on the board.".format(moving)
        )


def _accelerator_limits() -> Dict[str, clocks.Limits]:
    """Of the GPU where it has a clock that can be read, else of the cores."""
    found = clocks.limits()
    return {"gpu": found["gpu"]} if "gpu" in found else found


def _soon(condition: Any) -> bool:
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _restored(state: State) -> Any:
    """True, or what is in the way: a measurement is not lost for it, and the next job tries again."""
    try:
        state.restore()
    except DeviceError as exc:
        sys.stderr.write("{}\n".format(exc))
        return str(exc)
    return True


def _as_root(command: List[str], answer: str = "") -> str:
    """What the command prints. Raises DeviceError where root is not to be had without a password."""
    if shutil.which(command[0]) is None:
        raise DeviceError("{} is not on this machine.".format(command[0]), errors.BAD_REQUEST)
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if prefix and shutil.which("sudo") is None:
        raise DeviceError(_sudo_advice(command[0]), errors.BAD_REQUEST)
    output = _output(prefix + command, answer)
    if prefix and REFUSED.search(output):
        raise DeviceError(_sudo_advice(command[0]), errors.BAD_REQUEST)
    return output


def _sudo_advice(program: str) -> str:
    paths = [shutil.which(name) or "/usr/bin/" + name for name in ("nvpmodel", "jetson_clocks")]
    return (
        "{} needs root, and sudo asks for a password here. Add this line with `sudo visudo -f /etc/sudoers.d/jetway` "
        "on the target: {} ALL=(root) NOPASSWD: {}. Or leave power_mode and lock_clocks away.".format(
            program, getpass.getuser(), ", ".join(paths)
        )
    )


def _output(command: List[str], answer: str = "") -> str:
    """Both streams of a command, whatever its exit status: nvpmodel's says little."""
    try:
        done = subprocess.run(
            command,
            input=answer.encode("ascii"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError("`{}` did not end in {:.0f} s.".format(" ".join(command), COMMAND_TIMEOUT_S))
    return done.stdout.decode("utf-8", "replace")
