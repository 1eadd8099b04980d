"""What the environment asks of the double: the version it stands for, the device, and faults.

``TENSORRT_DOUBLE_FAULT`` holds faults, separated by commas:

    out_of_memory_above:MIB       a build with a larger workspace fails for want of memory
    killed_above:MIB              a build with a larger workspace is killed, as the kernel's OOM killer does
    crash                         a build ends with a segmentation fault
    no_implementation_below:MIB   a build with a smaller workspace finds no tactic for the first layer
    unsupported:OPERATOR          the parser does not know that ONNX operator
    disk_full                     a build fails as there is no space left on the device
    slow_build:SECONDS            a build lasts that long
    cannot_deserialize            no plan can be loaded
    execute_fails                 executing returns False
    wrong_outputs                 every value that an engine gives is off

``TENSORRT_DOUBLE_LOG`` names a file that gets a line for each build that begins.
"""

import os

from tensorrt import _surface


def _parts(version):
    return [int(part) for part in version.split(".") if part.isdigit()]


def _surface_version(version):
    """The newest known version that is not newer than the one asked for; 8.2.1.8 counts as 8.2.1."""
    known = [name for name in _surface.VERSIONS if _parts(name) <= _parts(version)]
    same = [name for name in _surface.VERSIONS if (name + ".").startswith(version + ".")]
    if not (known or same):
        raise ImportError(f"The double of TensorRT knows no version {version}.")
    return (same or known)[-1]


VERSION = os.environ.get("TENSORRT_DOUBLE_VERSION", "")
if not VERSION:
    raise ImportError("This is a double of TensorRT: set TENSORRT_DOUBLE_VERSION, such as 8.2.1.8.")
SURFACE_VERSION = _surface_version(VERSION)
NUMBER = tuple([*_parts(SURFACE_VERSION), 0, 0][:3])
MAJOR = NUMBER[0]
HAS_INT64 = MAJOR >= 10
HAS_BF16 = MAJOR >= 10
# The documents say: the last 10.x with DLA is 10.7, and 11.4 has it again.
HAS_DLA = not (10, 8) <= NUMBER[:2] < (11, 4)


def at_most(major, minor):
    return NUMBER[:2] <= (major, minor)


def compute_capability():
    return os.environ.get("CUDART_DOUBLE_COMPUTE_CAPABILITY") or "8.7"


def capability_number():
    return tuple(_parts(compute_capability()))


def dla_cores():
    return int(os.environ.get("TENSORRT_DOUBLE_DLA_CORES") or 0) if HAS_DLA else 0


def kernel_ms():
    return float(os.environ.get("TENSORRT_DOUBLE_KERNEL_MS") or 0)


def may_use_onnxruntime():
    return os.environ.get("TENSORRT_DOUBLE_COMPUTE") != "pattern"


def faults():
    """Faults by name, with their values as texts."""
    entries = (os.environ.get("TENSORRT_DOUBLE_FAULT") or "").split(",")
    return dict(entry.partition(":")[::2] for entry in entries if entry)


def note(text):
    """A line in the file that TENSORRT_DOUBLE_LOG names, if it names one."""
    path = os.environ.get("TENSORRT_DOUBLE_LOG")
    if path:
        with open(path, "a") as file:
            file.write(text + "\n")
