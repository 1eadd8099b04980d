"""What TensorRT says. It reports failures by returning None, and tells why in its log alone."""

import collections
import sys
from typing import Any, List

from jetway.tasks.on_device.tensorrt_engine import bindings

KEPT = 500
ERRORS = ("INTERNAL_ERROR", "ERROR")
WARNINGS = ("WARNING",)

_shared = []  # type: List[Any]


class Messages:
    """The last errors and warnings, in order; all of them go to stderr too. Threads may add some at once."""

    def __init__(self) -> None:
        self._kept = collections.deque(maxlen=KEPT)  # type: Any

    def add(self, severity: str, text: str) -> None:
        if severity in ERRORS + WARNINGS:
            self._kept.append((severity, text))
            sys.stderr.write("[TensorRT {}] {}\n".format(severity, text))

    def errors(self) -> List[str]:
        return [text for severity, text in list(self._kept) if severity in ERRORS]

    def warnings(self) -> List[str]:
        """Each once, in order."""
        texts = [text for severity, text in list(self._kept) if severity in WARNINGS]
        return list(collections.OrderedDict.fromkeys(texts))

    def clear(self) -> None:
        self._kept.clear()


def shared() -> Any:
    """The process's one logger, an ILogger with ``messages``: TensorRT wants the same everywhere, for ever."""
    if not _shared:
        _shared.append(_make(Messages()))
    return _shared[0]


def _make(messages: Messages) -> Any:
    trt = bindings.module()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Called from TensorRT's own threads; raises nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages = messages

        def log(self, severity: Any, msg: str) -> None:
            messages.add(severity.name, msg)

    return Logger()
