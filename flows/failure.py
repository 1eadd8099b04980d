"""How a command that failed says so: in words on stderr, and with ``--json`` as one object on stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.errors import JetwayError

INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """``status`` is FAILED or KILLED, as MLflow has it."""

    status: str
    exit_code: int
    error: str

    @classmethod
    def of(cls, exc: JetwayError | KeyboardInterrupt) -> Failure:
        if isinstance(exc, JetwayError):
            return cls("FAILED", exc.exit_code, str(exc))
        return cls("KILLED", INTERRUPTED, "interrupted")

    def tell(self) -> None:
        print(f"jetway: {self.error}", file=sys.stderr)

    def tell_as_json(self) -> None:
        """For what ends before there is anything else to print."""
        print(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1))
