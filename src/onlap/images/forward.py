"""Signals on their way to a container's process, which shall end as it would outside of a container.

There it is number 1 of its namespace, and the kernel drops every signal for it that it has no handler for
(pid_namespaces(7)): ``sleep`` would not end at Ctrl-C. So a signal that ends a process by default, and that this one
neither handles nor ignores nor blocks, is made a SIGKILL, and the exit status is that of the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType

from onlap.images import runtime

# What a terminal sends to all processes of its foreground, the runtime among them, which hands it on.
_FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
_HANDED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Forwarder:
    """Hands signals of this process on to a runtime and its container.

    Attributes:
        ended_by: the signal that a SIGKILL stood for, None when there was none.
    """

    def __init__(self, directory: str) -> None:
        self.ended_by: int | None = None
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals for the time of a block; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (*_FROM_TERMINALS, *_HANDED_ON)}
        # SIG_IGN was somebody's wish (nohup), and None is a handler that is not Python's.
        ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in ours:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """The runtime runs; what came before goes to it now."""
        self._process = process
        early, self._early = self._early, []
        for number in early:
            self._pass_on(process, number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        open("/tmp/w6/trace","a").write(f"{os.getpid()} {number} handle {self._process}\n")
        if self._process is None:
            self._early.append(number)
        else:
            self._pass_on(self._process, number)

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        if self._end(number):
            self.ended_by = number
        elif number not in _FROM_TERMINALS or not _in_foreground():
            process.send_signal(number)

    def _end(self, number: int) -> bool:
        """Kill the container's process if the kernel would drop the signal; whether it was done."""
        try:
            with open(runtime.pid_file(self._directory), encoding="ascii") as file:
                pid = int(file.read())
            process = os.pidfd_open(pid)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return False  # not started yet, or gone already: the runtime has the signal
        try:
            # Read behind pidfd_open: if it is of the right process, so is the descriptor.
            if not _is_dropped(pid, number):
                return False
            signal.pidfd_send_signal(process, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            return False
        finally:
            os.close(process)
        return True


def _is_dropped(pid: int, number: int) -> bool:
    """Whether a process is the first of a namespace, and does nothing about the signal. Source: proc_pid_status(5)."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
    numbers = fields["NSpid"].split()
    if len(numbers) < 2 or numbers[-1] != "1":
        return False
    open("/tmp/w6/trace","a").write(f"{os.getpid()} {pid} {number} {[(k,v) for k,v in fields.items() if k.startswith(('Sig','NSp','Name'))]}\n")
    masks = (int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt"))
    return not any(mask >> (number - 1) & 1 for mask in masks)


def _in_foreground() -> bool:
    """Whether a terminal's keys send their signals to us, and so to the runtime too."""
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False  # ENXIO: we have no terminal
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(fd)
