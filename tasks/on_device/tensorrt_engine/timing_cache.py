"""Kernel timings that earlier builds took on this board with this version, one file for each of these."""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

from jetway.tasks.on_device import outputs
from jetway.tasks.on_device.transfer import hash_file


class TimingCache:
    """The file for a platform in the work folder. Builds side by side add to it, and none loses what another took."""

    def __init__(self, work_dir: str, platform: Dict[str, Any]) -> None:
        text = json.dumps(platform, sort_keys=True)
        name = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16] + ".timing"
        self.path = os.path.join(outputs.timing_caches_folder(work_dir), name)
        self.facts = {"file": name, "hit": False, "ignored": False}  # type: Dict[str, Any]
        self._native = None  # type: Any

    def attach(self, config: Any) -> None:
        """Hands the file to the build. One that TensorRT does not take is ignored, and ``facts`` says so."""
        data = self._read()
        if data:
            self.facts.update(sha256=hash_file(self.path), size_bytes=len(data))
            self._native = _accepted(config, data)
            self.facts.update(hit=self._native is not None, ignored=self._native is None)
        if self._native is None:
            self._native = _accepted(config, b"")

    def save(self, config: Any) -> None:
        """Writes what the build knows now, together with what others have written meanwhile.

        The engine is there by now, so a disk that has no room for this is said and no more.
        """
        native = config.get_timing_cache()
        if native is not None:
            try:
                self._save(config, native)
            except OSError as exc:
                self.facts["not_saved"] = str(exc)

    def _save(self, config: Any, native: Any) -> None:
        with self._locked():
            theirs = self._read()
            other = config.create_timing_cache(theirs) if theirs else None
            if other is not None and not self.facts["ignored"]:
                native.combine(other, False)
            self._write(bytes(native.serialize()))

    def _read(self) -> Optional[bytes]:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _write(self, data: bytes) -> None:
        temporary = "{}.{}.part".format(self.path, os.getpid())
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path)
        finally:
            outputs.remove(temporary)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _accepted(config: Any, data: bytes) -> Any:
    """TensorRT's cache over the data once the build has taken it, or None."""
    native = config.create_timing_cache(data)
    taken = native is not None and config.set_timing_cache(native, False)
    return native if taken else None
