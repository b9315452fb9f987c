"""The units for systemd that are in ``deploy/``, for where Onlap and its root are here."""

from __future__ import annotations

import os
import re
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
    lines = files("onlap.serve").joinpath("deploy", name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(_settled(line, root) for line in lines)


def _settled(line: str, root: str) -> str:
    if line.startswith("ExecStart="):
        # A command's words are also searched for variables (systemd.service(5), "Command lines").
        return line.replace(_PROGRAM, _program()).replace(_ROOT, _word(root).replace("$", "$$"))
    return line.replace(_ROOT, _word(root))


def _program() -> str:
    """How this program was started, from anywhere."""
    if os.path.basename(sys.argv[0]) == "onlap" and os.access(sys.argv[0], os.X_OK):
        return _word(os.path.abspath(sys.argv[0]))
    return f"{_word(sys.executable)} -m onlap"


def _word(text: str) -> str:
    """One word of a setting (systemd.syntax(7), "Quoting"; systemd.unit(5), "Specifiers")."""
    text = text.replace("%", "%%")
    if not re.search(r"[\s\"'\\;]", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text).replace("\n", r"\n") + '"'
