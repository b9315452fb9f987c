"""Our own processes: what a forked child must not touch, and how a new process runs this same Onlap."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import ParamSpec, Protocol

P = ParamSpec("P")


class _Closeable(Protocol):
    def close(self) -> None: ...


class _Restarted(Protocol):
    def after_fork(self) -> None: ...


# A different one in each process: a pid is not enough, since a child may start a PID namespace, and be 1 there as well.
_here = object()
# Descriptors to close in children, and what has some.
_to_close: set[int] = set()
_things: weakref.WeakSet[_Closeable] = weakref.WeakSet()
_to_restart: weakref.WeakSet[_Restarted] = weakref.WeakSet()


def unless_forked(action: Callable[P, object]) -> Callable[P, None]:
    """``action`` for this process; in a child that is forked later, it does nothing.

    Such a child has its parent's ``with`` blocks on its stack and leaves them as well, but what they hold is its
    parent's.
    """
    here, pid = _here, os.getpid()  # the pid for a child that was forked behind Python's back

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if _here is here and os.getpid() == pid:
            action(*args, **kwargs)

    return guarded


def closed_in_children(fd: int) -> Callable[[], None]:
    """Have a descriptor closed in forked children; returns a function that closes it in this process.

    For children that execute a program there is close-on-exec.
    """
    _to_close.add(fd)

    def close() -> None:
        _to_close.discard(fd)
        os.close(fd)

    return unless_forked(close)


def close_in_children(thing: _Closeable) -> None:
    """Have a file or socket closed in forked children; in this process it closes when it is not referenced any more."""
    _things.add(thing)


def restarted_in_children(thing: _Restarted) -> None:
    """Call ``after_fork`` of a thing in each forked child: its thread, or its child process, stays with the parent."""
    _to_restart.add(thing)


def python(*arguments: str) -> list[str]:
    """A command that runs Python with :func:`environment`, without site-packages, which cost half its startup time."""
    return [sys.executable, "-S", "-P", *arguments]


def environment() -> dict[str, str]:
    """The environment in which a new Python process finds this Onlap, wherever it was imported from."""
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}


def _after_fork_in_child() -> None:
    global _here
    _here = object()
    while _to_close:
        os.close(_to_close.pop())
    for thing in list(_things):
        thing.close()
    _things.clear()
    for each in list(_to_restart):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
