"""A tracker whose MLflow is away for questions, while what is written still arrives, as through a spool."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jetway.tasks.errors import TrackingUnreachableError
from jetway.tasks.tracking.tracker import Tracker

Answer = TypeVar("Answer")


class MuteTracker(Tracker):
    """Answers like any other until it is ``away``."""

    away = False

    def _ask(self, what: str, call: Callable[[], Answer], patience_s: float | None = None) -> Answer:
        if self.away and not what.startswith(("write", "start")):
            raise TrackingUnreachableError(f"could not {what}")
        return super()._ask(what, call, patience_s)
