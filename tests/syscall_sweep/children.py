"""What the processes of a sweep share: how they begin and end, and what they tell."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class Report:
    """What the processes of a point tell, in a file that all of them append to.

    Args:
        base: the directory for it.
    """

    def __init__(self, base: str) -> None:
        self._path = f"{base}/report"
        self._said = f"{base}/said"

    def clear(self) -> None:
        """Begin a point."""
        for path in (self._path, self._said):
            with open(path, "w"):
                pass

    def tell(self, **what: object) -> None:
        """Add something."""
        with open(self._path, "a") as file:
            file.write(json.dumps(what) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """What was told."""
        with open(self._path) as file:
            return [json.loads(line) for line in file]

    def first(self, what: str) -> Any:
        """What was told by that name, first; None if nothing was."""
        return next((told[what] for told in self.all() if what in told), None)

    def said(self) -> str:
        """What came to the standard error of all of them."""
        with open(self._said, errors="replace") as file:
            return file.read()[-6000:]

    def fork(self, body: Callable[[], None]) -> int:
        """Start a child that does ``body`` and ends; its pid."""
        pid = os.fork()
        if not pid:
            self._live(body)
        return pid

    def _live(self, body: Callable[[], None]) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            fd = os.open(self._said, os.O_WRONLY | os.O_APPEND)
            os.dup2(fd, 2)
            os.close(fd)
            faulthandler.enable()
            sys.unraisablehook = self._tell_unraisable
            threading.excepthook = lambda what: self.tell(finding=f"a thread ended: {what.exc_value!r}")
            body()
            status = 0
        except BaseException:  # noqa: BLE001 - a child never goes on as its parent
            self.tell(finding=traceback.format_exc())
        finally:
            os._exit(status)

    def _tell_unraisable(self, what: sys.UnraisableHookArgs) -> None:
        # Python itself has no memory to start a thread.
        if not isinstance(what.exc_value, MemoryError):
            self.tell(finding=f"unraisable: {what.err_msg}: {what.exc_value!r} {what.object!r}")


def descriptors() -> dict[int, str]:
    """What is open in this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found
