"""Telling systemd how the service is; nothing happens where it was not started by systemd.

Source: sd_notify(3), the protocol of NOTIFY_SOCKET.
"""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send ``state``, as ``"READY=1"``.

    Raises:
        OSError: there is a socket, and it cannot be written to.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace (unix(7))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.sendall(state.encode())
