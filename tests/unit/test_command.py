"""The command line's own part: what it asks, what it refuses, and that it starts nothing then."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from jetway.flows import check
from jetway.flows.__main__ import main


@pytest.fixture
def nobody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.mark.usefixtures("nobody_types")
def test_trust_without_a_terminal_names_yes(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check._confirmed("Is it the same? ")
    assert "use --yes after comparing" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["abc", "0", "-3", "1.5"])
def test_clean_wants_a_positive_number(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["clean", f"--keep={number}"])
    assert caught.value.code == 2
    assert "positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["run"], 2), (["run", "no-such-recipe"], 2)]
)
def test_the_process_ends_with_its_exit_code(arguments: list[str], code: int) -> None:
    ended = subprocess.run([sys.executable, "-m", "jetway.flows", *arguments], capture_output=True, text=True)
    assert ended.returncode == code
    assert (ended.stdout or ended.stderr).strip()
    assert "Traceback" not in ended.stderr


def test_the_process_runs_its_exit_handlers_and_flushes_before_it_ends() -> None:
    program = (
        "from jetway.flows.__main__ import Ending; import atexit\n"
        "ending = Ending(); ending.code = 7; atexit.register(print, 'handled')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (7, "handled")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nightly"], 2, "recipe"),
        (["nightly", "digits", "--promote", "always"], 2, "invalid choice: 'always'"),
        (["nightly", "digits", "--budget-minutes", "0"], 2, "no number of minutes"),
        (["nightly", "digits", "no-such-recipe"], 2, "no-such-recipe"),
        (["nightly", "digits", "digits"], 2, "both the recipe 'digits'"),
        (["nightly", "digits", "--target", "no-such-target"], 2, "no-such-target"),
        (["promote", "no-such-run"], 6, "no run 'no-such-run'"),
    ],
)
def test_nightly_and_promote_refuse_what_cannot_be(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ended = main(arguments)
    except SystemExit as exc:
        ended = int(exc.code or 0)
    assert ended == code
    assert told in capsys.readouterr().err
