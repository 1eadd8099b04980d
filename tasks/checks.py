"""Checklists: what was checked, how it came out, and the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from rich.text import Text

from jetway.tasks.errors import JetwayError, TargetUnreachableError


class Outcome(StrEnum):
    """How a check came out. SKIPPED: it could not be made here, and its evidence says why."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


_STYLES = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.SKIPPED: "yellow"}


class Check(BaseModel):
    """One line of a checklist."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    verdict: Outcome
    evidence: str = Field(description="What was seen, with its limit; of a failure also what to do.")
    values: dict[str, Any] = Field(
        default_factory=dict, description="The figures behind the evidence, units in names."
    )


def judged(name: str, passed: bool, evidence: str, **values: Any) -> Check:
    """PASS or FAIL."""
    verdict = Outcome.PASS if passed else Outcome.FAIL
    return Check(name=name, verdict=verdict, evidence=evidence, values=values)


def skipped(name: str, reason: str, **values: Any) -> Check:
    return Check(name=name, verdict=Outcome.SKIPPED, evidence=reason, values=values)


def attempted(name: str, check: Callable[[], Check]) -> Check:
    """The check's outcome; an error of ours fails it, with the error's own words as evidence.

    Raises TargetUnreachableError all the same: without the target there is nothing more to check.
    """
    try:
        return check()
    except TargetUnreachableError:
        raise
    except JetwayError as exc:
        return judged(name, False, str(exc), error=type(exc).__name__)


def all_passed(checks: Iterable[Check]) -> bool:
    """Whether none failed."""
    return all(check.verdict is not Outcome.FAIL for check in checks)


def summary(checks: Sequence[Check]) -> str:
    """``14 PASS, 1 FAIL, 2 SKIPPED``."""
    verdicts = [check.verdict for check in checks]
    return ", ".join(f"{verdicts.count(outcome)} {outcome}" for outcome in Outcome if outcome in verdicts)


def checks_table(checks: Iterable[Check], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("check", overflow="fold")
    table.add_column("verdict")
    table.add_column("evidence", overflow="fold")
    for check in checks:
        verdict = Text(str(check.verdict), style=_STYLES[check.verdict])
        table.add_row(Text(check.name), verdict, Text(check.evidence))
    return table


def checks_markdown(checks: Iterable[Check]) -> str:
    lines = ["| check | verdict | evidence |", "| :-- | :-- | :-- |"]
    lines += [f"| {_cell(check.name)} | {check.verdict} | {_cell(check.evidence)} |" for check in checks]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays inside its cell."""
    return " ".join(text.split()).replace("|", "\\|")
