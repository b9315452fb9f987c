"""The boundary to the caller: only OnlapError leaves a public call, and exceptions of the caller's own functions.

Expected errors are translated where they happen, with a message that names the object concerned
(:func:`onlap.errors.from_oserror`). This is for the rest: a stat that was not expected to fail, a module that cannot be
imported for lack of descriptors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from types import FunctionType, GeneratorType, TracebackType
from typing import Any, TypeVar

from onlap import errors
from onlap.errors import from_oserror

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])

_RAW = (OSError, ImportError, MemoryError, RuntimeError, AssertionError)
_CALLERS_OWN = "_onlap_callers_own"

# What functions do whose names are not verbs, for messages.
_DOING = {
    "__init__": "open the root",
    "put": "store a blob",
    "mounted": "mount",
    "mounts": "plan the mounts",
    "scratch": "make a scratch tree",
    "usage": "measure",
    "changes": "compare",
    "diff": "compare",
    "images": "use images",
    "content": "use blobs",
    "bring": "take an image in",
}


def mark_callers_own(error: BaseException) -> None:
    """Mark an exception of a caller's own function, which is raised unchanged."""
    setattr(error, _CALLERS_OWN, True)


def public_class(cls: type[C]) -> type[C]:
    """Guard all public methods and properties of a class."""
    for name, value in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, FunctionType):
            setattr(cls, name, public(value))
        elif isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(public(value.fget), value.fset, value.fdel, value.__doc__))
    return cls


def public(function: F) -> F:
    """Guard a function, and the iterator or context manager that it returns."""
    name = function.__name__
    doing = _DOING.get(name) or name.strip("_").replace("_", " ")

    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            found = function(*arguments, **named)
        except _RAW as error:
            if hasattr(error, _CALLERS_OWN):
                raise
            raise _translated(error, doing) from error
        if isinstance(found, GeneratorType):
            return _steps(found, doing)
        if isinstance(found, AbstractContextManager) and hasattr(found, "gen"):  # contextlib.contextmanager's
            return _Block(found, doing)
        return found

    return guarded  # type: ignore[return-value]


def _steps(inner: Generator[Any, Any, Any], doing: str) -> Iterator[Any]:
    try:
        while True:
            try:
                step = next(inner)
            except StopIteration:
                return
            except _RAW as error:
                if hasattr(error, _CALLERS_OWN):
                    raise
                raise _translated(error, doing) from error
            yield step
    finally:
        inner.close()


class _Block(AbstractContextManager[Any]):
    def __init__(self, inner: AbstractContextManager[Any], doing: str) -> None:
        self._inner = inner
        self._doing = doing

    def __enter__(self) -> Any:
        try:
            return self._inner.__enter__()
        except _RAW as error:
            raise _translated(error, self._doing) from error

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, raised, traceback)
        except _RAW as error:
            if error is raised or hasattr(error, _CALLERS_OWN):
                raise
            raise _translated(error, self._doing) from error


def _translated(error: BaseException, doing: str) -> errors.OnlapError:
    if isinstance(error, OSError):
        return from_oserror(error, doing=doing)
    if isinstance(error, (MemoryError, RecursionError)):
        return errors.ResourceExhausted(f"cannot {doing}: {str(error) or 'out of memory'}")
    if isinstance(error, ImportError):
        return errors.Unavailable(
            f"cannot {doing}: {error}", hint="check the installation, and the limits of descriptors and memory"
        )
    if "can't start new thread" in str(error):
        return errors.ResourceExhausted(f"cannot {doing}: {error}", hint="raise the limit on threads (ulimit -u)")
    return errors.Internal(f"cannot {doing}: {type(error).__name__}: {error}", hint="please report it")
