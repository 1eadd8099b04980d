"""Targets that keep giving INVALID measurements, which runs on several targets leave out.

Nothing is kept of it but what MLflow has anyway: the validity of a target's newest sessions. So every worker comes to
the same answer, whatever its home, and one VALID session ends a quarantine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jetway.configs.schema import Target
from jetway.tasks.errors import MeasurementError
from jetway.tasks.results import TargetOutcome, TargetStatus
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import KIND_TAG, PARENT_TAG, RunRecord

#: On the runs of a session that somebody has forgiven, and with it all before it.
CLEARED_TAG = "jetway.quarantine"
CLEARED = "cleared"
#: Variants that a recipe mostly has, and more than any has: MLflow takes milliseconds for each run that it tells of.
RUNS_A_SESSION = (8, 32)


@dataclass(frozen=True)
class Session:
    """What one run measured on one target: a child run in MLflow for each variant."""

    run_id: str
    children: tuple[RunRecord, ...]

    @property
    def valid(self) -> bool:
        return all(child.tags.get("validity") == "VALID" for child in self.children)

    @property
    def cleared(self) -> bool:
        return any(child.tags.get(CLEARED_TAG) == CLEARED for child in self.children)


def newest_sessions(tracker: Tracker, target: str, count: int) -> list[Session]:
    """The newest sessions of a target, newest first. One run more than is asked for shows that the last is whole."""
    query = f"tags.target = '{target}' AND tags.`{KIND_TAG}` = 'variant' AND attributes.status = 'FINISHED'"
    for runs in RUNS_A_SESSION:
        limit = count * runs + 1
        children = tracker.search(query, limit=limit)
        sessions = _sessions_of(children)
        if len(sessions) > count or len(children) < limit:
            break
    return sessions[:count]


def _sessions_of(children: Iterable[RunRecord]) -> list[Session]:
    by_run: dict[str, list[RunRecord]] = {}
    for child in children:
        by_run.setdefault(child.tags.get(PARENT_TAG, child.run_id), []).append(child)
    return [Session(run_id, tuple(children)) for run_id, children in by_run.items()]


def invalid_in_a_row(tracker: Tracker, target: Target) -> list[Session]:
    """The target's newest sessions down to one that is valid or forgiven, at most ``quarantine_after``."""
    found: list[Session] = []
    for session in newest_sessions(tracker, target.name, target.quarantine_after):
        if session.valid or session.cleared:
            break
        found.append(session)
    return found


def why_quarantined(tracker: Tracker, target: Target) -> str:
    """The reason with the runs that it rests on; empty for a target that is not in quarantine."""
    if target.quarantine_after == 0:
        return ""
    invalid = invalid_in_a_row(tracker, target)
    if len(invalid) < target.quarantine_after:
        return ""
    runs = ", ".join(session.run_id[:8] for session in invalid)
    return (
        f"its newest {len(invalid)} measurements are INVALID (runs {runs}). See why: jetway show "
        f"{invalid[0].run_id[:8]}. Mend it, then run on it alone, or: jetway quarantine --clear {target.name}"
    )


def without_quarantined(
    tracker: Tracker, targets: Sequence[Target]
) -> tuple[list[Target], list[TargetOutcome]]:
    """The targets to run on, and those that are left out. One that is named alone is run on, come what may.

    Raises MeasurementError when none is left.
    """
    if len(targets) == 1:
        return list(targets), []
    reasons = {target.name: why_quarantined(tracker, target) for target in targets}
    skipped = [
        TargetOutcome(
            name=name, status=TargetStatus.QUARANTINED, error=reason, exit_code=MeasurementError.exit_code
        )
        for name, reason in reasons.items()
        if reason
    ]
    fit = [target for target in targets if not reasons[target.name]]
    if not fit:
        raise MeasurementError(f"Every target is in quarantine:{_lines(skipped)}")
    return fit, skipped


def clear(tracker: Tracker, target: str) -> int:
    """Forgives a target what it measured until now. Returns how many sessions of it there were to look at."""
    sessions = newest_sessions(tracker, target, 1)
    for session in sessions:
        for child in session.children:
            tracker.set_tags(child.run_id, {CLEARED_TAG: CLEARED})
    return len(sessions)


def _lines(outcomes: Iterable[TargetOutcome]) -> str:
    return "".join(f"\n  - {one.told}" for one in outcomes)
