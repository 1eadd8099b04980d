import os
import signal
import time

import pytest

from jetway.tasks.on_device import children
from jetway.tasks.on_device.errors import DeviceError

WORK = """
import os, signal, sys, time
from jetway.tasks.on_device import errors

def echo(request, progress):
    print("printed")
    progress({"text": "half way"})
    return {"heard": request["said"], "oom_score_adj": open("/proc/self/oom_score_adj").read().strip()}

def refuse(request, progress):
    raise errors.DeviceError("not so", errors.BUILD_FAILED, "disk_full")

def run_out(request, progress):
    raise MemoryError("no more")

def die(request, progress):
    sys.stderr.write("last words")
    sys.stderr.flush()
    os.kill(os.getpid(), request["signal"])

def talk(request, progress):
    sys.stderr.write("one")
    sys.stderr.flush()
    time.sleep(0.8)
    return {}

def leave(request, progress):
    os._exit(3)

def sleep(request, progress):
    progress({"pid": os.getpid()})
    time.sleep(request["seconds"])
    return {}
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    (tmp_path / "child_work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(function, progress=lambda line: None, **request):
    return children.run("child_work", function, request, progress)


def test_result_and_progress_come_back_and_prints_go_to_the_log(capsys):
    lines = []
    outcome = run("echo", lines.append, said="ä")
    assert outcome.result["heard"] == "ä"
    assert lines == [{"text": "half way"}]
    assert capsys.readouterr().err == "printed\n"


def test_the_kernel_is_asked_to_take_the_child_first():
    assert run("echo", said="").result["oom_score_adj"] == children.OOM_SCORE_ADJ


def test_an_error_keeps_its_kind_and_cause():
    with pytest.raises(DeviceError, match="not so") as caught:
        children.result_of("child_work", "refuse", {})
    assert (caught.value.kind, caught.value.cause) == ("build_failed", "disk_full")


def test_a_child_without_memory_says_so():
    assert run("run_out").error["cause"] == "out_of_memory"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_is_told_with_its_signal_and_last_words(number):
    outcome = run("die", signal=int(number))
    assert outcome.result is None
    assert outcome.error is None
    assert outcome.death() == f"was killed by {number.name}"
    assert "last words" in outcome.log


def test_a_child_that_leaves_without_a_word():
    with pytest.raises(DeviceError, match=r"child_work.leave ended without a result \(exit status 3\)"):
        children.result_of("child_work", "leave", {})


def test_a_bug_of_the_child_is_shown():
    with pytest.raises(DeviceError, match="KeyError: 'signal'"):
        children.result_of("child_work", "die", {})


def test_the_log_is_ours_while_the_child_runs(capfd):
    """A job that is ended meanwhile has said what it knew."""
    seen = []
    children.run("child_work", "talk", {}, print, lambda: seen.append(capfd.readouterr().err), idle_s=0.5)
    assert seen[0] == "one"


def test_silence_is_noticed():
    ticks = []
    children.run("child_work", "sleep", {"seconds": 1.2}, print, lambda: ticks.append(1), idle_s=0.3)
    assert 2 <= len(ticks) <= 4


def test_a_child_does_not_outlive_an_error_of_ours():
    seen = []

    def fail(line):
        seen.append(line["pid"])
        raise OSError("nobody listens")

    started = time.monotonic()
    with pytest.raises(OSError, match="nobody listens"):
        run("sleep", fail, seconds=60)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
