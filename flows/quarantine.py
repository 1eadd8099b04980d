"""``jetway quarantine``: the project's targets that runs on several leave out, and their pardon."""

from __future__ import annotations

from jetway.configs.load import ALL, load_target, load_targets
from jetway.tasks.errors import ConfigError
from jetway.tasks.quarantine import clear, why_quarantined
from jetway.tasks.tracking.tracker import Tracker


def list_quarantined() -> int:
    """Prints each with its reason."""
    tracker = Tracker()
    reasons = {target.name: why_quarantined(tracker, target) for target in load_targets([ALL])}
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: {reason}")
    if not any(reasons.values()):
        print(f"None of {', '.join(reasons)} is in quarantine.")
    return 0


def clear_target(name: str) -> int:
    """Ends a target's quarantine. Raises ConfigError for one that is not there or has never been measured."""
    target = load_target(name)
    if not clear(Tracker(), target.name):
        raise ConfigError(f"{target.name} has never been measured, so there is nothing to clear.")
    print(f"{target.name}: what was measured until now does not count against it.")
    return 0
