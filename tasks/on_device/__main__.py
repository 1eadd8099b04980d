"""``python AGENT call VERB LENGTH`` runs a quick verb; ``python AGENT follow JOB LENGTH`` starts a job or
attaches to one.

stdin begins with ``LENGTH`` bytes of JSON. stdout carries our lines only: what a verb prints goes to stderr.
"""

import json
import os
import sys
from typing import Any, BinaryIO, Dict

from jetway.tasks.on_device import job


def main() -> int:
    out = own_stdout()
    try:
        spec = read_spec(int(sys.argv[3]))
        if sys.argv[1] == "follow":
            return job.follow(spec, out)
        job.emit(out, **job.run_verb(spec, lambda line: None))
    except OSError as exc:
        job.emit(out, error=job.describe_failure(exc))
    return 0


def own_stdout() -> BinaryIO:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def read_spec(length: int) -> Dict[str, Any]:
    """Reads the request and no further: what follows are heartbeats."""
    text = b""
    while len(text) < length:
        block = os.read(0, length - len(text))
        if not block:
            sys.exit("The host closed the connection before its request was whole.")
        text += block
    spec = json.loads(text.decode())  # type: Dict[str, Any]
    if spec["schema_version"] != job.SCHEMA_VERSION:
        sys.exit("This agent speaks version %d, not %s." % (job.SCHEMA_VERSION, spec["schema_version"]))
    spec["work_dir"] = os.path.abspath(spec["work_dir"])  # a job changes folders
    return spec


if __name__ == "__main__":
    sys.exit(main())
