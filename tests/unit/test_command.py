"""The command line's own part: what it asks, what it refuses, and that it starts nothing then."""

from __future__ import annotations

import io

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
