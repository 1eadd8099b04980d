"""Switches fake Jetsons on, and writes a target file for each, until Ctrl-C.

    PYTHONPATH=tests .venv/bin/python -m doubles.fake_jetson                       # names them
    PYTHONPATH=tests .venv/bin/python -m doubles.fake_jetson simulated-orin-nano-jp62
    .venv/bin/jetway probe simulated-orin-nano-jp62                                # in another terminal

``NAME=VALUE`` words go into the login's environment: TENSORRT_DOUBLE_FAULT=out_of_memory_above:512 makes a build walk
down its ladder, TENSORRT_DOUBLE_KERNEL_MS=2 makes every inference last that long.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from doubles.fake_jetson.machines import MACHINES
from doubles.fake_jetson.target import FakeJetson

TARGETS = Path("configs/targets")


def main(words: list[str]) -> int:
    names = [word for word in words if "=" not in word]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    if not names or not set(names) <= set(MACHINES):
        print(f"Which of these? {', '.join(MACHINES)}")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fake-jetson-")))
        for name in names:
            jetson = FakeJetson(folder / name, name, folder)
            jetson.set(**variables)
            stack.callback(jetson.close)
            path = jetson.write_target(TARGETS if TARGETS.is_dir() else Path.cwd())
            stack.callback(path.unlink)
            print(f"{name} listens on port {jetson.port}; its target file is {path}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("switched off")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
