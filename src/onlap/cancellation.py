"""Calls that another thread can cancel, and undo: what :mod:`onlap.aio` needs of the code that it calls.

A thread cannot be stopped. But work that takes long looks here whether it is still wanted, and work that makes
something says here how that is undone. Outside of such a call all of this does nothing.
"""

from __future__ import annotations

import contextlib
from _thread import allocate_lock
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from onlap import errors

_current: ContextVar[Call | None] = ContextVar("onlap_call", default=None)


class Call:
    """One call, made in a thread of its own; a context manager for that thread."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._canceled = False
        self._stops: list[Callable[[], object]] = []
        self._made: list[Callable[[], object]] = []

    def __enter__(self) -> Call:
        _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.set(None)

    def cancel(self) -> None:
        """Let it end early; from any thread."""
        with self._lock:
            self._canceled = True
            for stop in self._stops:
                stop()

    def check(self) -> None:
        """Raise Canceled if it is not wanted any more."""
        if self._canceled:
            raise errors.Canceled("the call was canceled")

    def undo(self) -> None:
        """Undo what it made, the last first."""
        while self._made:
            self._made.pop()()

    def keep(self) -> None:
        """Let what it made so far not be undone."""
        self._made.clear()

    @contextlib.contextmanager
    def _stopping(self, stop: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            self._stops.append(stop)
            if self._canceled:
                stop()
        try:
            yield
        finally:
            # Nothing is stopped after this: it may be another's by then, as a process id is.
            with self._lock:
                self._stops.remove(stop)

    def _note(self, undo: Callable[[], object]) -> None:
        self._made.append(undo)


def current() -> Call | None:
    """The call that this thread works for."""
    return _current.get()


def check() -> None:
    """Raise Canceled if the work of this thread is not wanted any more."""
    call = _current.get()
    if call is not None:
        call.check()


def made(undo: Callable[[], object]) -> None:
    """Say how what this thread just made is undone; that must not fail if it is gone already."""
    call = _current.get()
    if call is not None:
        call._note(undo)


def keep() -> None:
    """What this thread has made so far stays, even if its work is canceled."""
    call = _current.get()
    if call is not None:
        call.keep()


def stopping(stop: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """In this block, ``stop`` is called if the work of this thread is canceled: in another thread. It must not wait."""
    call = _current.get()
    return contextlib.nullcontext() if call is None else call._stopping(stop)
