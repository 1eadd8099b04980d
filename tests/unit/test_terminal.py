"""Progress on a terminal and elsewhere."""

import io
import logging
import re

import pytest
from rich.console import Console

from jetway.flows.terminal import Terminal

CONTROL = re.compile(r"\x1b|\r")


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_prints_plain_lines_where_there_is_no_terminal() -> None:
    console = plain_console()
    with Terminal(console) as terminal:
        terminal("finetune", 1, 4, "epoch 1, a long text that is wider than the console is")
        terminal.finish_stage("finetune", 12.34, False)
        terminal.finish_stage("prune", 0.01, True)
    assert not CONTROL.search(text_of(console))
    first, second, third = text_of(console).splitlines()
    assert first.split()[:3] == ["finetune", "25", "%"]
    assert first.endswith("than the console is")
    assert second.split() == ["finetune", "12.3", "s"]
    assert third.split() == ["prune", "reused"]


def test_terminal_keeps_what_others_print_out_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(plain_console()):
        print("Loading an extension...")
    print("{}")
    assert capsys.readouterr() == ("{}\n", "Loading an extension...\n")


def test_terminal_throttles_plain_lines_by_stage() -> None:
    console = plain_console()
    with Terminal(console, line_interval_s=3600) as terminal:
        for step in range(50):
            terminal("finetune", step, 50)
            terminal("build", step, 0, "working")
    assert [line.split()[0] for line in text_of(console).splitlines()] == ["finetune", "build"]


def test_terminal_says_more_once_the_interval_is_over() -> None:
    console = plain_console()
    with Terminal(console, line_interval_s=0) as terminal:
        for step in range(3):
            terminal("finetune", step, 3)
    assert len(text_of(console).splitlines()) == 3


def test_terminal_shows_live_lines_and_removes_them() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Terminal(console) as terminal:
        terminal("upload [1/2]", 5, 10, "of 200 MB")
        terminal("upload [1/2]", 10, 10, "[red] of 200 MB")
        terminal._bars.refresh()
        assert "[red] of 200 MB" in text_of(console)
        terminal.finish_stage("upload [1/2]", 1.5, False)
        assert terminal._bars.tasks == []
    assert "upload [1/2]" in text_of(console)


def test_terminal_shows_warnings_once_and_hides_information() -> None:
    console, elsewhere = plain_console(), io.StringIO()
    root_handler = logging.StreamHandler(elsewhere)
    logging.getLogger().addHandler(root_handler)
    logger = logging.getLogger("jetway")
    try:
        with Terminal(console):
            logger.info("of no interest here")
            logger.warning("disk is %d %% [full]", 93)
        logger.warning("afterwards")
    finally:
        logging.getLogger().removeHandler(root_handler)
    assert text_of(console) == "warning: disk is 93 % [full]\n"
    assert elsewhere.getvalue() == "afterwards\n"
