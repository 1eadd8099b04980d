"""A page in headless Chromium, looked at through its DevTools: what it says, what its frames say, and a picture."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

WAIT_S = 60.0
POLL_S = 0.2
#: Longest picture of a page that DevTools may send.
MESSAGE_BYTES = 64 * 2**20


class Tab:
    """One tab. A frame that Chromium keeps apart, as it does sandboxed ones, has a DevTools session of its own."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._frames: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._page = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask(
            "Target.setAutoAttach", self._page, autoAttach=True, waitForDebuggerOnStart=False, flatten=True
        )

    def open(self, address: str, *wanted: str, framed: str = "") -> str:
        """The page's text, once it holds all that is wanted and its frame all that is in ``framed``."""
        self._ask("Page.navigate", self._page, url=address)
        deadline = time.monotonic() + WAIT_S
        while True:
            words, inside = self._words(self._page), " ".join(map(self._words, self._frames))
            if all(one in words for one in wanted) and framed in inside:
                return words
            assert time.monotonic() < deadline, f"{wanted} and {framed!r} in:\n{words}\nframes: {inside}"
            time.sleep(POLL_S)

    def picture(self) -> Image.Image:
        told = self._ask("Page.captureScreenshot", self._page)["data"]
        return Image.open(io.BytesIO(base64.b64decode(told))).convert("RGB")

    def _words(self, session: str) -> str:
        script = "document.body ? document.body.innerText : ''"
        found = self._ask("Runtime.evaluate", session, expression=script).get("result", {})
        return " ".join(found.get("value", "").split())

    def _ask(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        told = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(told | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT_S))
            if answer.get("method") == "Target.attachedToTarget":
                self._frames.append(answer["params"]["sessionId"])
            if answer.get("id") == number:
                return dict(answer.get("result", {}))


@contextmanager
def open_tab(folder: Path, *, size: tuple[int, int]) -> Iterator[Tab]:
    """Chromium with its profile in the folder, for as long as the block lasts; a test without one is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "--remote-debugging-port=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with connect(_address(folder / "DevToolsActivePort"), max_size=MESSAGE_BYTES, proxy=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(30)


def _address(told: Path) -> str:
    """Chromium writes a line with its port, and one with a path, once it listens."""
    deadline = time.monotonic() + WAIT_S
    while not told.exists() or len(lines := told.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, "Chromium does not start"
        time.sleep(POLL_S)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
