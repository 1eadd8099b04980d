"""Verb ``engine_file``: what an engine's file, its passport and this machine are, without loading the engine."""

import os
from typing import Any, Callable, Dict

from jetway.tasks.on_device import passport
from jetway.tasks.on_device.errors import DeviceError


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Takes ``path``. ``sha256`` and ``size_bytes`` are None for a file that is gone, ``passport`` for one that
    cannot be read; ``platform`` is what an engine that is built here now would say, and ``reason`` why there is none.
    """
    path = request["path"]
    there = os.path.isfile(path)
    written = passport.read(path)
    found = {
        "sha256": passport.file_sha256(path) if there else None,
        "size_bytes": os.path.getsize(path) if there else None,
        "passport": written,
        "platform": None,
        "reason": "",
    }
    try:
        if written is not None:
            found["platform"] = passport.current_platform(
                written["platform"]["engine"], written["load_options"]
            )
    except DeviceError as exc:
        found["reason"] = str(exc)
    except (KeyError, TypeError) as exc:
        found["reason"] = "the passport lacks {}".format(exc)
    return found
