"""Signals for a container's process, which must end as it would outside of a container.

It is process 1 of its PID namespace, and the kernel drops every signal for it that it has no handler for
(pid_namespaces(7)): ``sleep`` would not end at Ctrl-C. So a signal that ends a process by default, and that this one
does not handle, ignore or block, becomes a SIGKILL, and the exit status is that of the signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from onlap import errors
from onlap.mounts import namespaces
from onlap.trees.walk import opened

# A terminal sends these to all processes of its foreground, among them the runtime, which forwards them.
_FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Seconds. A signal between the interpreter's last check and a system call does not interrupt that call, and Python's
# handler runs only after it; another thread that takes the interpreter's lock just then widens the gap.
_PATIENCE = 0.2


class Forwarder:
    """Forwards signals of this process to a runtime and its container.

    Attributes:
        ended_by: the signal that a SIGKILL replaced; None where none was.
    """

    def __init__(self) -> None:
        self.ended_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals for the time of a block, in the main thread of a process; other threads cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (*_FROM_TERMINALS, *_FORWARDED)}
        # SIG_IGN was set on purpose (nohup), and None is a handler that is not Python's.
        handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in handled:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number in handled:
                signal.signal(number, before[number])

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """Forward to this runtime, also the signals that came before it ran."""
        self._process = process
        early, self._early = self._early, []
        for number in early:
            self._forward(process, number)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the runtime, while signals are forwarded; returns its exit status."""
        pidfd = os.pidfd_open(process.pid)
        try:
            while not _has_ended(pidfd, _PATIENCE):
                pass  # Python's handlers have run
        finally:
            os.close(pidfd)
        return process.wait()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._forward(self._process, number)

    def _forward(self, process: subprocess.Popen[bytes], number: int) -> None:
        if _end(process.pid, number):
            self.ended_by = number
        elif number not in _FROM_TERMINALS or not _in_foreground():
            process.send_signal(number)


def _has_ended(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within a time (pidfd_open(2), Linux 5.3)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _end(parent: int, number: int) -> bool:
    """Kill the container's process, a child of the runtime, if the kernel would drop the signal; True if it was killed.

    The runtime writes its pid file only after the start.
    """
    for pid in namespaces.pids():
        fields = namespaces.status(pid)
        if fields.get("PPid") != str(parent) or not _is_dropped(fields, number):
            continue
        if kill(pid, lambda pid: namespaces.status(pid).get("PPid") == str(parent)):
            return True
    return False


def kill(pid: int, is_right: Callable[[int], bool], *, patience: float = 0.0) -> bool:
    """Kill a process if it is the right one; True if it was killed.

    Args:
        pid: its number.
        is_right: whether the process with this number is the right one.
        patience: seconds to wait for its end; 0: do not wait.

    Raises:
        Busy: it does not end.
    """
    if not is_right(pid):
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Behind pidfd_open again: if it is of the right process, so is the descriptor.
        if not is_right(pid):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if patience and not _has_ended(process, patience):
            raise errors.Busy(f"process {pid} of a container does not end", hint="see: onlap cleanup")
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


def _is_dropped(fields: Mapping[str, str], number: int) -> bool:
    """Whether a process is the first of its own PID namespace, and does not handle, ignore or block the signal."""
    numbers = fields["NSpid"].split()
    if len(numbers) < 2 or numbers[-1] != "1":
        return False
    masks = (int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt"))
    return not any(mask >> (number - 1) & 1 for mask in masks)


def _in_foreground() -> bool:
    """Whether a terminal's keys send their signals to this process, and so to the runtime, too."""
    try:
        with opened("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC) as fd:
            return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False  # ENXIO: there is no terminal
