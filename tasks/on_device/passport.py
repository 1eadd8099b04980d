"""The passport of an engine: a JSON file beside it that says what it is, what made it, and where it fits."""

import glob
import hashlib
import json
import os
from typing import Any, Dict, Optional

from jetway.tasks.on_device import engines, errors, machine
from jetway.tasks.on_device.errors import DeviceError

SCHEMA_VERSION = 2


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def passport_path(engine_path: str) -> str:
    return engine_path + ".json"


def current_platform(engine: str, load_options: Dict[str, Any]) -> Dict[str, Any]:
    """What an engine built here depends on. An engine fits where all of it is the same."""
    facts = engines.engine_of(engine).platform_facts(load_options)  # type: Dict[str, Any]
    return dict(facts, simulated=machine.simulated() or facts.get("double", False))


def file_name(request: Dict[str, Any], facts: Dict[str, Any]) -> str:
    """Name of the engine that this machine builds from the ONNX file: same inputs, same name.

    ``facts`` are those of the passport that are known before the build. ``revision`` of the request is the
    recipe's: raising it asks for a new build of the same. Behind the dash stands how the engine is loaded: what
    differs in that alone need not be built again.
    """
    made_of = {key: value for key, value in facts.items() if key != "load_options"}
    known = dict(made_of, onnx=request["onnx_sha256"], revision=request["revision"])
    return "{}-{}.engine".format(_digest(known, 32), _digest(facts["load_options"], 8))


def _digest(value: Any, characters: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()[:characters]


def loaded_otherwise(engine_path: str) -> Optional[str]:
    """A sound engine that differs from this one in how it is loaded alone; None without one."""
    others = glob.glob(engine_path.rpartition("-")[0] + "-*.engine")
    return next((path for path in sorted(others) if path != engine_path and is_sound(path)), None)


def write(engine_path: str, passport: Dict[str, Any]) -> None:
    """Writes the passport; it appears whole or not at all."""
    temporary = passport_path(engine_path) + ".part"
    with open(temporary, "w") as file:
        json.dump(passport, file, indent=1, sort_keys=True)
    os.replace(temporary, passport_path(engine_path))


def read(engine_path: str) -> Optional[Dict[str, Any]]:
    """The passport, or None when it is missing or cannot be read."""
    try:
        with open(passport_path(engine_path)) as file:
            passport = json.load(file)
    except (OSError, ValueError):
        return None
    return passport if isinstance(passport, dict) else None


def touch(engine_path: str) -> None:
    """Marks the engine as in use, which keeps it from being swept away."""
    for path in (engine_path, passport_path(engine_path)):
        os.utime(path)


def is_sound(engine_path: str) -> bool:
    """Whether the engine is there, is what its passport says, and was built for this machine."""
    passport = read(engine_path)
    return (
        passport is not None
        and os.path.exists(engine_path)
        and passport.get("engine_sha256") == file_sha256(engine_path)
        and passport.get("platform") == _platform_for(passport)
    )


def check(engine_path: str, expected_sha256: str) -> Dict[str, Any]:
    """The passport of an engine that may be loaded here: intact, and built for this machine.

    Raises DeviceError: bad_request when it is gone, corrupt when its digest is another, mismatch when it was
    built elsewhere.
    """
    if not os.path.exists(engine_path):
        raise DeviceError(
            "The engine {} is no longer on the target. Run again: it is built anew.".format(engine_path),
            errors.BAD_REQUEST,
        )
    digest = file_sha256(engine_path)
    if digest != expected_sha256:
        raise DeviceError(
            "The engine {} is corrupt: its sha256 is {}, not {}. It was not loaded. Run again: it is built "
            "anew.".format(engine_path, digest[:12], expected_sha256[:12]),
            errors.CORRUPT,
        )
    passport = read(engine_path)
    if passport is None:
        raise DeviceError(
            "The engine {} has no readable passport, so nothing says what machine it is for. Build it on "
            "this target.".format(engine_path),
            errors.MISMATCH,
        )
    check_platform(engine_path, passport, "Build it on this target.")
    return passport


def _platform_for(passport: Dict[str, Any]) -> Dict[str, Any]:
    return current_platform(passport["platform"]["engine"], passport["load_options"])


def check_platform(engine_path: str, passport: Dict[str, Any], advice: str) -> None:
    """Raises DeviceError (mismatch) where the engine was built for another machine."""
    built_on, here = passport.get("platform", {}), _platform_for(passport)
    differences = [
        "{} is {} here and was {} there".format(key, here[key], built_on.get(key))
        for key in sorted(here)
        if here[key] != built_on.get(key)
    ]
    if differences:
        raise DeviceError(
            "The engine {} was built for another machine: {}. {}".format(
                engine_path, "; ".join(differences), advice
            ),
            errors.MISMATCH,
        )
