"""Verb ``build``: an engine and its passport from an ONNX file, or the one built earlier from the same."""

import errno
import os
import time
from typing import Any, Callable, Dict

from jetway.tasks.on_device import engines, errors, machine, outputs, passport, tensors
from jetway.tasks.on_device.errors import DeviceError

# An engine, its temporary name and some room, against the size of the ONNX file.
DISK_FACTOR = 2.5
# Share of the work that the build is; the rest is to load the engine and to run it.
BUILT = 0.9

Progress = Callable[[Dict[str, Any]], None]


def run(request: Dict[str, Any], progress: Progress) -> Dict[str, Any]:
    """Builds, loads what was built, and runs it once.

    Takes ``onnx`` and ``inputs`` (paths), ``onnx_sha256``, ``engine``, ``options`` (that engine's), ``threads``,
    ``revision``, ``work_dir``, and ``provenance``, which goes into the passport as it is. Returns ``engine``
    (path), ``passport`` and ``reused``. An engine that an earlier build made from the same is used again when it
    still is what its passport says.
    """
    facts = known_facts(request)
    folder = outputs.engines_folder(request["work_dir"])
    engine_path = os.path.join(folder, passport.build_key(request, facts) + ".engine")
    reused = passport.is_sound(engine_path)
    if reused:
        passport.touch(engine_path)
    else:
        _build(request, facts, engine_path, progress)
    return {"engine": engine_path, "passport": passport.read(engine_path), "reused": reused}


def known_facts(request: Dict[str, Any]) -> Dict[str, Any]:
    """What the passport says that is known before the build. Raises DeviceError where the engine is absent."""
    name = request.get("engine", engines.DEFAULT)
    engine = engines.engine_of(name)
    engine.version()
    load_options = engine.load_options(request)
    return {
        "schema_version": passport.SCHEMA_VERSION,
        "platform": passport.current_platform(name, load_options),
        "options": engine.build_options(request),
        "load_options": load_options,
    }


def _build(request: Dict[str, Any], facts: Dict[str, Any], engine_path: str, progress: Progress) -> None:
    """In the job's own folder until the engine has been loaded and has run; then the passport goes first."""
    temporary = outputs.scratch_path("engine.part")
    _check_disk(request["onnx"], os.path.dirname(engine_path))
    engine = engines.engine_of(facts["platform"]["engine"])
    try:
        progress({"done": 0, "total": 1, "text": "building"})
        started = time.monotonic()
        facts = dict(facts, **engine.build(request, temporary, _within(progress, 0.0, BUILT)))
        build_s = time.monotonic() - started
        progress({"done": BUILT, "total": 1, "text": "loading the engine and running it once"})
        facts.update(try_out(engine, temporary, facts["load_options"], request["inputs"]))
        passport.write(engine_path, describe(request, facts, temporary, build_s))
        os.replace(temporary, engine_path)
        progress({"done": 1, "total": 1, "text": "built"})
    except OSError as exc:
        raise disk_error(exc, request["onnx"])
    finally:
        outputs.remove(temporary)


def _within(progress: Progress, start: float, end: float) -> Progress:
    """Progress of a part, as progress of the whole."""

    def report(line: Dict[str, Any]) -> None:
        share = line.get("done", 0.0) / (line.get("total") or 1.0)
        progress(dict(line, done=round(start + share * (end - start), 4), total=1))

    return report


def try_out(engine: Any, path: str, load_options: Dict[str, Any], inputs_path: str) -> Dict[str, Any]:
    """Loads the engine, runs it once, and returns what can be told about it then."""
    session = engine.Session(path, load_options)
    try:
        inputs = session.inputs_of(tensors.read_tensors(inputs_path))
        session.run_checked(inputs)
    finally:
        session.close()
    facts = engine.inspect(path, load_options, inputs)  # type: Dict[str, Any]
    return facts


def disk_error(exc: OSError, onnx_path: str) -> DeviceError:
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Free some of the disk." if full else "Look at the file and its folder on the target."
    text = "The engine of {} could not be written: {}. {}".format(onnx_path, exc, advice)
    return DeviceError(text, errors.BUILD_FAILED, "disk_full" if full else "unknown")


def _check_disk(onnx_path: str, folder: str) -> None:
    needed_mib = os.path.getsize(onnx_path) * DISK_FACTOR / 2.0**20 + 1
    free_mib = machine.free_disk_mib(folder)
    if free_mib < needed_mib:
        raise DeviceError(
            "The build needs {:.0f} MiB of disk, and {} has {:.0f} MiB free. Free some, or set work_dir in "
            "the target file to a folder on a larger disk.".format(needed_mib, folder, free_mib),
            errors.BUILD_FAILED,
            "disk_full",
        )


def describe(
    request: Dict[str, Any], facts: Dict[str, Any], engine_path: str, build_s: float
) -> Dict[str, Any]:
    """The passport."""
    return dict(
        facts,
        engine_sha256=passport.file_sha256(engine_path),
        engine_size_bytes=os.path.getsize(engine_path),
        onnx_sha256=request["onnx_sha256"],
        provenance=request.get("provenance", {}),
        cpu=machine.cpu(),
        board=machine.board(),
        l4t=machine.l4t_release(),
        threads=request["threads"],
        built_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        build_s=build_s,
        simulated=facts["platform"]["simulated"],
    )
