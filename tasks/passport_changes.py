"""Why an engine could not be used again: what its passport says and what its target is today."""

from __future__ import annotations

from jetway.tasks.artifacts import Engine


def passport_changes(recorded: Engine, rebuilt: Engine) -> str:
    """Each fact of the platform that is another now; else that the file was gone, or lay on another target."""
    before, after = recorded.metadata.get("platform", {}), rebuilt.metadata.get("platform", {})
    changes = [
        f"{key} was {before.get(key)} and is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    where = recorded.metadata.get("target"), rebuilt.metadata.get("target")
    if where[0] != where[1]:
        changes.insert(0, f"it was built on {where[0]}")
    return "; ".join(changes) or "its file was no longer on the target"
