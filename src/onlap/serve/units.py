"""The units for systemd that are in ``deploy/``, for where Onlap and its root are here."""

from __future__ import annotations

import os
import sys
from importlib.resources import files

# What the units say.
_PROGRAM = "/usr/local/bin/onlap"
_ROOT = "/var/lib/onlap"


def unit(name: str, root: str = _ROOT) -> str:
    """A unit.

    Args:
        name: as ``"onlap-containerd.service"``.
        root: what the server is to serve.
    """
    text = files("onlap.serve").joinpath("deploy", name).read_text(encoding="utf-8")
    return text.replace(_PROGRAM, _escaped(_program())).replace(_ROOT, _escaped(root))


def _program() -> str:
    """How this program was started, from anywhere."""
    if os.path.basename(sys.argv[0]) == "onlap" and os.access(sys.argv[0], os.X_OK):
        return os.path.abspath(sys.argv[0])
    return f"{sys.executable} -m onlap"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # systemd.unit(5), "Specifiers"
