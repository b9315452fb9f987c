"""What systemd needs of a server: its units, and word of its state.

Source for the latter: sd_notify(3), the protocol of NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from importlib.resources import files

_log = logging.getLogger("onlap.serve")

# In the units.
_PROGRAM = "/usr/local/bin/onlap"
_ROOT = "/var/lib/onlap"


def notify(state: str) -> None:
    """Send ``state``, as ``"READY=1"``, to systemd if it started this process; a failure is only logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace (unix(7))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        _log.warning("cannot tell systemd", extra={"fields": {"state": state, "error": error}})


def unit(name: str, root: str = _ROOT) -> str:
    """A unit of ``deploy/``, for this machine's Onlap and root.

    Args:
        name: as ``"onlap-containerd.service"``.
        root: the root to serve.
    """
    lines = files("onlap.serve").joinpath("deploy", name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(_adapted(line, root) for line in lines)


def _adapted(line: str, root: str) -> str:
    if line.startswith("ExecStart="):
        # Variables are also expanded in the words of a command (systemd.service(5), "Command lines").
        return line.replace(_PROGRAM, _program()).replace(_ROOT, _word(root).replace("$", "$$"))
    return line.replace(_ROOT, _word(root))


def _program() -> str:
    """A command that starts this program from anywhere."""
    if os.path.basename(sys.argv[0]) == "onlap" and os.access(sys.argv[0], os.X_OK):
        return _word(os.path.abspath(sys.argv[0]))
    return f"{_word(sys.executable)} -m onlap"


def _word(text: str) -> str:
    """One word of a setting (systemd.syntax(7), "Quoting"; systemd.unit(5), "Specifiers")."""
    text = text.replace("%", "%%")
    if not re.search(r"[\s\"'\\;]", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text).replace("\n", r"\n") + '"'
