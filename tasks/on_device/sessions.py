"""Engines as verbs take them: an entry of the request, checked against its passport, then loaded.

An entry has ``name``, ``path``, ``sha256`` and ``inputs`` (the path of tensors that the engine takes).
"""

from typing import Any, Dict, Tuple

from jetway.tasks.on_device import engines, passport, tensors


def checked(entry: Dict[str, Any]) -> Dict[str, Any]:
    """The entry with ``engine``, ``load_options`` and ``uses_gpu`` from the passport of an engine that fits here.

    Raises DeviceError where it does not, before anything is loaded.
    """
    found = passport.check(entry["path"], entry["sha256"])
    return dict(
        entry,
        engine=found["platform"]["engine"],
        load_options=found["load_options"],
        uses_gpu="gpu" in found["platform"],
    )


def opened(entry: Dict[str, Any]) -> Any:
    """The loaded engine of a checked entry; the caller closes it."""
    return engines.engine_of(entry["engine"]).Session(entry["path"], entry["load_options"])


def opened_with_inputs(entry: Dict[str, Any]) -> Tuple[Any, Dict[str, Any]]:
    """The loaded engine, having run once, and its inputs."""
    session = opened(entry)
    try:
        inputs = session.inputs_of(tensors.read_tensors(entry["inputs"]))
        session.run_checked(inputs)
    except Exception:
        session.close()
        raise
    return session, inputs
