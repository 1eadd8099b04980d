"""The target's content-addressed files, ``<work folder>/blobs/<sha256>``, checked before they are used."""

import os
from typing import Any, Iterator

from jetway.tasks.on_device import errors, transfer


def check_request(request: Any, work_dir: str) -> None:
    """Checks the digest of every blob whose path the request holds; a corrupt one is removed.

    Raises DeviceError, kind ``corrupt`` or ``bad_request``.
    """
    for path in sorted(set(_blob_paths(request, os.path.join(work_dir, "blobs")))):
        if not os.path.exists(path):
            raise errors.DeviceError(
                "%s is not on the target. Run the pipeline again: it will be sent anew." % path,
                kind=errors.BAD_REQUEST,
            )
        if transfer.hash_file(path) != os.path.basename(path):
            os.remove(path)
            raise errors.DeviceError(
                "%s on the target does not match its digest and was removed. "
                "Run the pipeline again: it will be sent anew." % path,
                kind=errors.CORRUPT,
            )


def _blob_paths(value: Any, folder: str) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            for path in _blob_paths(item, folder):
                yield path
    elif isinstance(value, str) and os.path.dirname(value) == folder:
        yield value
