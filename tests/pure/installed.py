"""Where the Onlap that is tested comes from: the checkout, or a wheel that is installed (``make dist``)."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path

import onlap


def _source() -> Path:
    found = Path(onlap.__file__).resolve().parents[1]
    if found.name == "src":
        return found
    # An installed one lies beside other packages, which a command without them must not find.
    alone = tempfile.TemporaryDirectory(prefix="onlap-installed-")
    atexit.register(alone.cleanup)
    (Path(alone.name) / "onlap").symlink_to(found / "onlap")
    return Path(alone.name)


# A directory with the package and nothing else, for PYTHONPATH.
SOURCE = _source()
