"""Telling systemd how the service is; nothing happens where it was not started by systemd.

Source: sd_notify(3), the protocol of NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger("onlap.serve")


def notify(state: str) -> None:
    """Send ``state``, as ``"READY=1"``; where that cannot be, say so in the log: nobody is served worse for it."""
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
