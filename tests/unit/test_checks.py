"""Lines of a checklist, and what becomes of errors in them."""

import io

import pytest
from rich.console import Console

from jetway.tasks.checks import (
    Outcome,
    all_passed,
    attempted,
    checks_markdown,
    checks_table,
    judged,
    skipped,
    summary,
)
from jetway.tasks.errors import RemoteCommandError, TargetUnreachableError

CHECKS = [
    judged("disk", True, "9 | 1 MiB"),
    skipped("clocks", "not told"),
    judged("lease", False, "held\nby x"),
]


def raiser(error):
    def check():
        raise error

    return check


def test_an_error_fails_its_check_in_its_own_words():
    check = attempted("build", raiser(RemoteCommandError("no room: free some")))
    assert (check.name, check.verdict, check.evidence) == ("build", Outcome.FAIL, "no room: free some")
    assert check.values == {"error": "RemoteCommandError"}


def test_a_lost_target_and_a_bug_are_no_outcome():
    for error in (TargetUnreachableError("away"), ZeroDivisionError()):
        with pytest.raises(type(error)):
            attempted("build", raiser(error))


def test_what_was_skipped_did_not_fail():
    assert all_passed(CHECKS[:2])
    assert not all_passed(CHECKS)
    assert summary(CHECKS) == "1 PASS, 1 FAIL, 1 SKIPPED"


def test_markdown_keeps_each_check_in_its_row():
    assert checks_markdown(CHECKS).splitlines()[2:] == [
        "| disk | PASS | 9 \\| 1 MiB |",
        "| clocks | SKIPPED | not told |",
        "| lease | FAIL | held by x |",
    ]


def test_the_table_shows_evidence_to_the_letter():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(checks_table([judged("a", True, "[red] of 1")], "target"))
    assert "[red] of 1" in console.export_text()
