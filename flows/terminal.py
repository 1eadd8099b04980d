"""What a person sees of a run: a live line for each stage at work, and one line for each that is done."""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import redirect_stdout
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

logger = logging.getLogger("jetway")

#: Seconds between two lines of one stage where the output is no terminal.
LINE_INTERVAL_S = 10.0


class Terminal:
    """Follows the stages of a run on stderr, so that stdout holds the table or the JSON alone.

    It is the ``Progress`` that stages call. On a terminal each stage at work has a live line; elsewhere there
    are plain lines without control codes, at most one in ``LINE_INTERVAL_S`` seconds and stage. Inside
    ``with``, warnings of the ``jetway`` logger appear as lines too, and only once, and what libraries and
    workloads print goes to stderr.
    """

    def __init__(self, console: Console | None = None, *, line_interval_s: float = LINE_INTERVAL_S) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bars = Progress(
            SpinnerColumn("line"),
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._line_interval_s = line_interval_s
        self._last_line_s: dict[str, float] = {}
        self._lock = threading.RLock()
        self._warnings = _LogLines(self)

    def __call__(self, stage: str, done: float, total: float, text: str = "") -> None:
        """``done`` of ``total`` steps of a stage; a total of 0 is work of unknown length."""
        with self._lock:
            if self._live:
                self._show(stage, done, total, text)
            else:
                self._print_seldom(stage, done, total, text)

    def finish_stage(self, stage: str, seconds: float, cached: bool) -> None:
        """Leaves one line for a stage that ended: its seconds, or that its result was reused."""
        with self._lock:
            if stage in self._tasks:
                self._bars.remove_task(self._tasks.pop(stage))
            self._last_line_s.pop(stage, None)
            self.line(f"  {stage:<32} {'reused' if cached else f'{seconds:.1f} s':>9}")

    def line(self, text: str, style: str = "") -> None:
        """A line of its own, above the live ones."""
        self.console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        self._propagate, logger.propagate = logger.propagate, False
        logger.addHandler(self._warnings)
        self._printed = redirect_stdout(sys.stderr)
        self._printed.__enter__()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._printed.__exit__(kind, error, trace)
        logger.removeHandler(self._warnings)
        logger.propagate = self._propagate

    def _show(self, stage: str, done: float, total: float, text: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, text=text)
        self._bars.update(self._tasks[stage], completed=done, total=total or None, text=text)

    def _print_seldom(self, stage: str, done: float, total: float, text: str) -> None:
        now = time.monotonic()
        if now - self._last_line_s.get(stage, float("-inf")) < self._line_interval_s:
            return
        self._last_line_s[stage] = now
        share = f"{100 * done / total:3.0f} %" if total else "..."
        self.line(f"  {stage:<32} {share:>9}  {text}".rstrip())


class _LogLines(logging.Handler):
    """Warnings and errors as lines that do not tear the live ones."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        self._terminal.line(f"{record.levelname.lower()}: {record.getMessage()}", style)
