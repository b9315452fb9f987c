"""Processes of ours: what a forked child must leave alone, and how a new one runs this very Onlap."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

# Another one in each process: the number alone says little where a child may begin a PID namespace, and be 1 as well.
_here = object()
# Open files that are not for children.
_ours: set[int] = set()


def unless_forked(action: Callable[P, object]) -> Callable[P, None]:
    """The action for the process that asks now.

    A child forked later has its parent's ``with`` blocks on its stack and leaves them as well; in it the action does
    nothing: the thing is its parent's.
    """
    here, pid = _here, os.getpid()  # the number for who is forked behind Python's back

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if _here is here and os.getpid() == pid:
            action(*args, **kwargs)

    return guarded


def closed_in_children(fd: int) -> Callable[[], None]:
    """See to it that forked children do not keep a descriptor open; returns what closes it here.

    A child that executes a program is another matter: for that there is close-on-exec.
    """
    _ours.add(fd)

    def close() -> None:
        _ours.discard(fd)
        os.close(fd)

    return unless_forked(close)


def python(*arguments: str) -> list[str]:
    """A command that runs Python with :func:`environment`, without the site's packages, which cost half its start."""
    return [sys.executable, "-S", "-P", *arguments]


def environment() -> dict[str, str]:
    """Our environment, in which a new Python finds this Onlap wherever it was imported from."""
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}


def _after_fork_in_child() -> None:
    global _here
    _here = object()
    while _ours:
        os.close(_ours.pop())


os.register_at_fork(after_in_child=_after_fork_in_child)
