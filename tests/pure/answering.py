"""What answers the requests of a test's worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from onlap import errors


def answer(request: Mapping[str, Any], progress: Callable[[int], None]) -> Mapping[str, Any]:
    """Do what the request says, and answer it and the pid."""
    if request.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "die in a line" in request:
        os.write(1, b'{"answer": {"pid"')
        os.kill(os.getpid(), signal.SIGKILL)
    if "error" in request:
        raise errors.InvalidArgument("a bad request", key=request["error"], hint="ask better")
    if "open" in request:
        os.close(os.open(request["open"], os.O_WRONLY))
    for reached in range(request.get("steps", 0)):
        progress(reached)
    if "wait" in request:
        with open(request["wait"], "rb") as file:  # a FIFO
            file.read()
    return {"pid": os.getpid(), "echo": request.get("echo")}
