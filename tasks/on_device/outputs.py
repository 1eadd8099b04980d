"""Where verbs leave files in the work folder, and for how long.

A job's current folder is its own and goes when the job does, however it ends: unfinished files belong there.
"""

import os
import shutil
import time

OUTPUTS_KEPT_S = 24 * 3600.0
ENGINES_KEPT_S = 30 * 24 * 3600.0


def outputs_folder(work_dir: str) -> str:
    """For results that the host pulls at once."""
    return _folder(work_dir, "outputs", OUTPUTS_KEPT_S)


def engines_folder(work_dir: str) -> str:
    """For engines, which later builds use again."""
    return _folder(work_dir, "engines", ENGINES_KEPT_S)


def timing_caches_folder(work_dir: str) -> str:
    """For what builders learned about kernels."""
    return _folder(work_dir, "timing_caches", ENGINES_KEPT_S)


def compiled_folder(engine_path: str) -> str:
    """For what an engine that compiles parts of itself as it is loaded keeps for the next time."""
    return engine_path + ".compiled"


def result_path(work_dir: str, name: str, suffix: str) -> str:
    """A new file for the host to pull."""
    unique = "{}-{}-{}{}".format(name, os.getpid(), time.time(), suffix)
    return os.path.join(outputs_folder(work_dir), unique)


def scratch_path(name: str) -> str:
    return os.path.abspath(name)


def _folder(work_dir: str, name: str, kept_s: float) -> str:
    """Makes the folder, and removes what nobody has touched for ``kept_s``."""
    folder = os.path.join(work_dir, name)
    os.makedirs(folder, exist_ok=True)
    for entry in list(os.scandir(folder)):
        if time.time() - entry.stat().st_mtime > kept_s:
            remove(entry.path)
    return folder


def remove(path: str) -> None:
    """A file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.unlink(path)
