"""The one error that on-device code raises on purpose. The host turns its kind into an error of its own."""

from typing import Dict

BAD_REQUEST = "bad_request"  # the request lacks a key or names a file that is not there
MISMATCH = "mismatch"  # the engine is absent or too old, or the file was built elsewhere
BUILD_FAILED = "build_failed"  # ``cause`` says why in one word, such as out_of_memory
CORRUPT = "corrupt"  # a blob does not match its digest
BUSY = "busy"  # another job holds the accelerator
DISK_FULL = "disk_full"
OUT_OF_MEMORY = "out_of_memory"
TIMEOUT = "timeout"
ORPHANED = "orphaned"  # the host fell silent
CANCELLED = "cancelled"  # the host asked the job to stop
FAILED = "failed"  # anything else; the message says what

KINDS = (
    BAD_REQUEST,
    MISMATCH,
    BUILD_FAILED,
    CORRUPT,
    BUSY,
    DISK_FULL,
    OUT_OF_MEMORY,
    TIMEOUT,
    ORPHANED,
    CANCELLED,
    FAILED,
)


class DeviceError(Exception):
    """Message first: what, where, what to do next. ``kind`` is one of ``KINDS``; ``cause`` is for builds."""

    def __init__(self, message: str, kind: str = FAILED, cause: str = "unknown") -> None:
        super().__init__(message)
        self.kind = kind
        self.cause = cause

    def to_json(self) -> Dict[str, str]:
        return {"message": str(self), "kind": self.kind, "cause": self.cause}
