"""What the command changes of its own process: streams, signals, and the limit of open files."""

from __future__ import annotations

import os
import resource
import signal
import sys

_limits_before: tuple[int, int] | None = None


class Terminated(BaseException):
    """A signal asked the command to end; raised so that everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def prepare() -> None:
    """Prepare the process for any verb."""
    _open_standard_streams()
    raise_open_files()
    if hasattr(sys.stdout, "reconfigure"):
        # A locale that cannot show a name must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # The caller may have set SIG_IGN on purpose: nohup(1).
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one.

    A stack of 500 layers is mounted with 500 descriptors, and the usual limit is 1024.

    Source: Go raises it at start since 1.19 (src/os/rlimit.go), and gives its children the old one back, since a
    program that uses select(2) breaks above 1024.
    """
    global _limits_before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return  # a seccomp filter, or a hard limit above fs.nr_open: the soft limit is enough for most stacks
    _limits_before = (soft, hard)


def open_files_before() -> tuple[int, int]:
    """The limits of open files that the command was started with, for the user's commands."""
    return _limits_before or resource.getrlimit(resource.RLIMIT_NOFILE)


def _open_standard_streams() -> None:
    """Open /dev/null for each closed one: else the next file opened would take its number, and a child write to it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _terminate(number: int, _frame: object) -> None:
    raise Terminated(number)
