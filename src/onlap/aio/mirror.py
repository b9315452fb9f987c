"""How a method of a class is mirrored for asyncio: its arguments and result, with exact types, in one line.

::

    class Store(Mirror[onlap.Store]):
        stat = call(onlap.Store.stat)      # info = await store.stat(key)
        walk = steps(onlap.Store.walk)     # async for info in store.walk()
        build = block(onlap.Store.build)   # async with store.build(name) as tree
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

from onlap import cancellation, errors
from onlap.aio.threads import InLoop, Threads

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
P = ParamSpec("P")

# Undoes a call: gets the object, what the method returned, and the arguments by their names.
Undo = Callable[[Any, Any, Mapping[str, Any]], object]

# Seconds after which the steps that a thread has made are handed over, and how many at most.
_BATCH_TIME = 0.01
_BATCH = 1000


class Method(Protocol[P, R_co]):
    """A function in a class."""

    def __get__(self, instance: object, owner: type | None = None, /) -> Callable[P, R_co]:
        """The bound method."""
        ...


class Mirror(Generic[S]):
    """An object whose methods are those of another, for asyncio.

    Attributes:
        sync: the other, whose methods may be called in the caller's own threads.
    """

    def __init__(self, sync: S, threads: Threads) -> None:
        self.sync = sync
        self._threads = threads

    def __repr__(self) -> str:
        return f"<aio of {self.sync!r}>"

    def _exclusive(self) -> AbstractAsyncContextManager[object]:
        return contextlib.nullcontext()


def call(
    method: Callable[Concatenate[S, P], T],
    *,
    undo: Undo | None = None,
    exclusive: bool = False,
    own_thread: bool = False,
) -> Method[P, Coroutine[Any, Any, T]]:
    """Mirror a method as a coroutine.

    Args:
        method: the method.
        undo: called if the task was canceled meanwhile.
        exclusive: wait for other such calls for the same workspace.
        own_thread: make the call in a thread of its own, since it may take long; what it has made stays.
    """
    return wrapping(lambda _threads, made: made, method, undo=undo, exclusive=exclusive, own_thread=own_thread)


def wrapping(
    make: Callable[[Threads, T], R],
    method: Callable[Concatenate[S, P], T],
    *,
    undo: Undo | None = None,
    exclusive: bool = False,
    own_thread: bool = False,
) -> Method[P, Coroutine[Any, Any, R]]:
    """Mirror a method as :func:`call` does, and wrap what it returns.

    Args:
        make: makes the result of the coroutine from what the method returned.
        method: the method.
        undo: as for :func:`call`, like the rest.
        exclusive: likewise.
        own_thread: likewise.
    """

    @functools.wraps(method)
    async def mirrored(self: Mirror[S], *arguments: P.args, **named: P.kwargs) -> R:
        progress = _report_in_loop(named)
        bound = partial(method, self.sync, *arguments, **named)
        undone = None if undo is None else _undoing(undo, method, self.sync, arguments, named)
        async with self._exclusive() if exclusive else contextlib.nullcontext():
            made = await self._threads.call(bound, undo=undone, own_thread=own_thread)
        if progress is not None and progress.error is not None:
            raise progress.error
        return make(self._threads, made)

    return cast("Method[P, Coroutine[Any, Any, R]]", mirrored)


def attribute(owner: type[S], get: Callable[[S], T]) -> Attribute[S, T]:
    """Mirror a property as one that is awaited: ``await workspace.at``."""
    return Attribute(owner, get)


class Attribute(Generic[S, T]):
    """A property whose value is awaited."""

    def __init__(self, owner: type[S], get: Callable[[S], T]) -> None:
        self._owner = owner
        self._get = get

    def __set_name__(self, _owner: type, name: str) -> None:
        self.__doc__ = getattr(self._owner, name).__doc__

    def __get__(self, instance: Mirror[S], _owner: type | None = None) -> Coroutine[Any, Any, T]:
        if instance is None:
            return self  # type: ignore[unreachable] # as a property does
        return instance._threads.call(partial(self._get, instance.sync))


def block(
    method: Callable[Concatenate[S, P], AbstractContextManager[T]], *, undo: Undo | None = None
) -> Method[P, AbstractAsyncContextManager[T]]:
    """Mirror a context manager.

    Args:
        method: returns it.
        undo: called if the task was canceled at the end of the block.
    """

    @functools.wraps(method)
    @contextlib.asynccontextmanager
    async def mirrored(self: Mirror[S], *arguments: P.args, **named: P.kwargs) -> AsyncIterator[T]:
        threads = self._threads

        def enter() -> tuple[AbstractContextManager[T], T]:
            manager = method(self.sync, *arguments, **named)
            return manager, manager.__enter__()

        manager, value = await threads.call(enter, undo=lambda entered: _abandon(entered[0]))
        try:
            yield value
        except BaseException as error:
            leave = partial(manager.__exit__, type(error), error, error.__traceback__)
            if not await threads.call(leave, shielded=True):
                raise
        else:
            undone = None if undo is None else _undoing(undo, method, self.sync, arguments, named)
            await threads.call(partial(manager.__exit__, None, None, None), undo=undone, shielded=True)

    return cast("Method[P, AbstractAsyncContextManager[T]]", mirrored)


def _undoing(
    undo: Undo, method: Callable[..., object], sync: object, arguments: tuple[object, ...], named: Mapping[str, object]
) -> Callable[[object], object]:
    """Undoes one call, when it gets what that returned."""
    return lambda made: undo(sync, made, inspect.signature(method).bind(sync, *arguments, **named).arguments)


def _abandon(manager: AbstractContextManager[object]) -> None:
    """Leave a block that nobody has seen the inside of, so that it keeps nothing."""
    error = errors.Canceled("the call was canceled")
    try:
        manager.__exit__(errors.Canceled, error, None)
    except errors.Canceled as raised:
        if raised is not error:
            raise


def steps(method: Callable[Concatenate[S, P], Iterator[T]]) -> Method[P, AsyncGenerator[T, None]]:
    """Mirror an iterator; many of its steps are made at once, in a thread."""

    @functools.wraps(method)
    async def mirrored(self: Mirror[S], *arguments: P.args, **named: P.kwargs) -> AsyncGenerator[T, None]:
        threads = self._threads
        iterator = await threads.call(partial(method, self.sync, *arguments, **named))
        try:
            ended = False
            while not ended:
                batch, ended, error = await threads.call(partial(_some, iterator))
                for step in batch:
                    yield step
                if error is not None:
                    raise error
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                await threads.call(close, shielded=True)

    return cast("Method[P, AsyncGenerator[T, None]]", mirrored)


def _some(iterator: Iterator[T]) -> tuple[list[T], bool, Exception | None]:
    """The next steps of an iterator; whether it ended; the error that ended it."""
    until = time.monotonic() + _BATCH_TIME
    batch: list[T] = []
    while len(batch) < _BATCH and time.monotonic() < until:
        cancellation.check()
        try:
            batch.append(next(iterator))
        except StopIteration:
            return batch, True, None
        except Exception as error:  # noqa: BLE001 - raised after the steps before it
            return batch, True, error
    return batch, False, None


def _report_in_loop(named: dict[str, Any]) -> InLoop | None:
    """Let a callback among the arguments be called in the thread of the event loop."""
    if not callable(named.get("progress")):
        return None
    named["progress"] = progress = InLoop(named["progress"])
    return progress
