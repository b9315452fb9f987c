"""Signals on their way to a container's process, which shall end as it would outside of a container.

There it is number 1 of its namespace, and the kernel drops every signal for it that it has no handler for
(pid_namespaces(7)): ``sleep`` would not end at Ctrl-C. So a signal that ends a process by default, and that this one
neither handles nor ignores nor blocks, is made a SIGKILL, and the exit status is that of the signal.
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

# What a terminal sends to all processes of its foreground, the runtime among them, which hands it on.
_FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
_HANDED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Seconds. A signal between the last look of the interpreter and a system call does not interrupt that call, and then
# Python's handler waits for its end; another thread that takes the interpreter's lock just then makes the gap wide.
_PATIENCE = 0.2


class Forwarder:
    """Hands signals of this process on to a runtime and its container.

    Attributes:
        ended_by: the signal that a SIGKILL stood for, None when there was none.
    """

    def __init__(self) -> None:
        self.ended_by: int | None = None
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

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status of the runtime, when it ends; signals are handed on meanwhile."""
        with contextlib.closing(_Ended(process.pid)) as ended:
            while not ended.wait(_PATIENCE):
                pass  # Python's handlers have run
        return process.wait()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._pass_on(self._process, number)

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        if _end(process.pid, number):
            self.ended_by = number
        elif number not in _FROM_TERMINALS or not _in_foreground():
            process.send_signal(number)


class _Ended:
    """The end of a child that nobody has waited for yet, as a descriptor (pidfd_open(2), Linux 5.3)."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Whether it comes within a time."""
        return bool(self._poll.poll(seconds * 1000))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def _end(parent: int, number: int) -> bool:
    """Kill the container's process, a child of the runtime, if the kernel would drop the signal; whether it was done.

    The runtime writes its pid file only after the start.
    """
    for pid in namespaces.pids():
        fields = namespaces.status(pid)
        if fields.get("PPid") != str(parent) or not _is_dropped(fields, number):
            continue
        if kill(pid, lambda pid: namespaces.status(pid).get("PPid") == str(parent)):
            return True
    return False


def kill(pid: int, is_one: Callable[[int], bool], *, patience: float = 0.0) -> bool:
    """Kill a process, if it is the one that is meant; whether it was done.

    Args:
        pid: its number.
        is_one: whether the process of that number is meant.
        patience: how many seconds to wait for its end, if at all.

    Raises:
        Busy: it does not end.
    """
    if not is_one(pid):
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Behind pidfd_open again: if it is of the right process, so is the descriptor.
        if not is_one(pid):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        if patience and not waiting.poll(patience * 1000):
            raise errors.Busy(f"process {pid} of a container does not end", hint="see: onlap cleanup")
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


def _is_dropped(fields: Mapping[str, str], number: int) -> bool:
    """Whether a process is the first of a namespace of its own, and does nothing about the signal."""
    numbers = fields["NSpid"].split()
    if len(numbers) < 2 or numbers[-1] != "1":
        return False
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
