"""Verb ``build``: an engine and its passport from an ONNX file, or the one built earlier from the same."""

import errno
import os
import shutil
import time
from typing import Any, Callable, Dict

from jetway.tasks.on_device import engines, errors, machine, outputs, passport, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile

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
    still is what its passport says; one that was to be loaded in another way is copied.
    """
    facts = known_facts(request)
    folder = outputs.engines_folder(request["work_dir"])
    engine_path = os.path.join(folder, passport.file_name(request, facts))
    reused = passport.is_sound(engine_path)
    if reused:
        passport.touch(engine_path)
    else:
        reused = _make(request, facts, engine_path, progress)
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
        "external_data": external_data(request["onnx"]),
    }


def external_data(onnx_path: str) -> Dict[str, str]:
    """Digests of the files that hold weights of the network, by name. One that is missing is the parser's to tell."""
    there = [path for path in OnnxFile(onnx_path).external_paths if os.path.isfile(path)]
    folder = os.path.dirname(onnx_path)
    return {os.path.relpath(path, folder): passport.file_sha256(path) for path in there}


def _make(request: Dict[str, Any], facts: Dict[str, Any], engine_path: str, progress: Progress) -> bool:
    """In the job's own folder until the engine has been loaded and has run; then the passport goes first.

    Returns whether an earlier build served.
    """
    temporary = outputs.scratch_path(os.path.basename(engine_path))
    _check_disk(request["onnx"], os.path.dirname(engine_path))
    engine = engines.engine_of(facts["platform"]["engine"])
    earlier = passport.loaded_otherwise(engine_path)
    try:
        if earlier:
            found = _copied(earlier, temporary)
        else:
            found = _built(engine, request, temporary, progress)
        progress({"done": BUILT, "total": 1, "text": "loading the engine and running it once"})
        found.update(facts, **try_out(engine, temporary, facts["load_options"], request["inputs"]))
        passport.write(engine_path, describe(request, found, temporary))
        _keep(temporary, engine_path)
        progress({"done": 1, "total": 1, "text": "copied" if earlier else "built"})
    except OSError as exc:
        raise disk_error(exc, request["onnx"])
    finally:
        outputs.remove(temporary)
        outputs.remove(outputs.compiled_folder(temporary))
    return earlier is not None


def _built(engine: Any, request: Dict[str, Any], path: str, progress: Progress) -> Dict[str, Any]:
    progress({"done": 0, "total": 1, "text": "building"})
    started = time.monotonic()
    found = engine.build(request, path, _within(progress, 0.0, BUILT))
    built_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return dict(found, build_s=time.monotonic() - started, built_at=built_at)


def _copied(earlier: str, path: str) -> Dict[str, Any]:
    """What the other engine's passport says stays true, but for how it is loaded."""
    shutil.copyfile(earlier, path)
    return passport.read(earlier) or {}


def _keep(temporary: str, engine_path: str) -> None:
    """With what the engine compiled as it was loaded, so that whoever loads it next need not."""
    compiled, kept = outputs.compiled_folder(temporary), outputs.compiled_folder(engine_path)
    if os.path.isdir(compiled):
        outputs.remove(kept)
        os.rename(compiled, kept)
    os.replace(temporary, engine_path)


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
    weights = filter(os.path.isfile, OnnxFile(onnx_path).external_paths)
    needed_mib = sum(map(os.path.getsize, [onnx_path, *weights])) * DISK_FACTOR / 2.0**20 + 1
    free_mib = machine.free_disk_mib(folder)
    if free_mib < needed_mib:
        raise DeviceError(
            "The build needs {:.0f} MiB of disk, and {} has {:.0f} MiB free. Free some, or set work_dir in "
            "the target file to a folder on a larger disk.".format(needed_mib, folder, free_mib),
            errors.BUILD_FAILED,
            "disk_full",
        )


def describe(request: Dict[str, Any], facts: Dict[str, Any], engine_path: str) -> Dict[str, Any]:
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
        simulated=facts["platform"]["simulated"],
    )
