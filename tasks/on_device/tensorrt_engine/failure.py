"""What a failed build means, from TensorRT's words or from how its process ended: one word of ``cause``."""

import re
import signal
from typing import Optional

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.children import Outcome
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine.logger import Messages

#: A smaller workspace may help against these, and never where a kernel wants a larger one.
MEMORY_CAUSES = ("out_of_memory", "killed")

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|cannot allocate memory|memory .{0,40}could not be allocated"
    r"|STATUS_ALLOC_FAILED|NvMapMem\w*: \d+ error 12|cudaErrorMemoryAllocation|MEM_ALLOC_FAILED",
    re.IGNORECASE,
)
SMALL_WORKSPACE = re.compile(
    r"insufficient workspace|insufficient memory on requested size|increas\w+ the (max )?workspace",
    re.IGNORECASE,
)
DISK_FULL = re.compile(r"no space left|disk quota exceeded", re.IGNORECASE)
UNSUPPORTED = re.compile(r"not supported|unsupported|could not find any implementation", re.IGNORECASE)
ADVICE = {
    "out_of_memory": "Free memory on the target (or add swap), or give tensorrt.workspace_mib a smaller rung.",
    "killed": "The kernel does that when memory is short: free some (or add swap), or give tensorrt.workspace_mib a "
    "smaller rung.",
    "disk_full": "Free some disk on the target, or set work_dir in the target file to a larger one.",
    "unsupported_operator": "Replace that layer, or take another precision.",
    "small_workspace": "Give tensorrt.workspace_mib a larger rung.",
    "unknown": "See the log.",
}


def cause_of(text: str) -> str:
    """``out_of_memory``, ``small_workspace``, ``disk_full``, ``unsupported_operator`` or ``unknown``."""
    if DISK_FULL.search(text):
        return "disk_full"
    if OUT_OF_MEMORY.search(text):
        return "out_of_memory"
    if SMALL_WORKSPACE.search(text):
        return "small_workspace"
    return "unsupported_operator" if UNSUPPORTED.search(text) else "unknown"


def build_failed(what: str, cause: str, words: str = "") -> DeviceError:
    said = " TensorRT says: {}".format(" ".join(words.split())[-1500:]) if words else ""
    return DeviceError("{}. {}{}".format(what, ADVICE[cause], said), errors.BUILD_FAILED, cause)


def of_messages(what: str, messages: Messages) -> DeviceError:
    """The error for a step of TensorRT that gave nothing back.

    That no kernel was found for a layer may be for want of memory, which only the warnings before it say.
    """
    words = "; ".join(messages.errors()) or "nothing"
    cause = cause_of(words)
    if cause in ("unsupported_operator", "unknown"):
        hint = cause_of("; ".join(messages.warnings()))
        cause = hint if hint in ("out_of_memory", "small_workspace") else cause
    return build_failed(what, cause, words)


def of_outcome(outcome: Outcome) -> Optional[DeviceError]:
    """The error of a build in a child, or None where it went well."""
    if outcome.result is not None:
        return None
    if outcome.error is not None:
        return DeviceError(**outcome.error)
    cause = _cause_of_death(outcome)
    return build_failed("The build {}".format(outcome.death()), cause, outcome.log)


def _cause_of_death(outcome: Outcome) -> str:
    if outcome.returncode == -signal.SIGKILL:
        return "killed"
    cause = cause_of(outcome.log)
    return cause if cause in ("out_of_memory", "disk_full") else "unknown"
