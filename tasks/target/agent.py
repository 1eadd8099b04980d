"""The agent: ``tasks/on_device`` as one zipapp, the same bytes every time."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

ON_DEVICE = Path(__file__).parents[1] / "on_device"
PACKAGE = "jetway/tasks/on_device"
EPOCH = (1980, 1, 1, 0, 0, 0)

# It must parse in any Python, so that an old one can say what is wrong.
MAIN = """\
import sys
if sys.version_info < (3, 6):
    sys.exit("needs Python 3.6 or newer, and this is %s" % sys.version.split()[0])
from jetway.tasks.on_device.__main__ import main
sys.exit(main())
"""


def build_agent(folder: Path = ON_DEVICE) -> bytes:
    """Packs the modules of a folder; equal sources give equal bytes, so the digest names the version."""
    files = {"__main__.py": MAIN.encode(), "jetway/__init__.py": b"", "jetway/tasks/__init__.py": b""}
    files |= {
        f"{PACKAGE}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.py")
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), files[name])
    return buffer.getvalue()
