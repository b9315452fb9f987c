"""The boundary to the caller: only OnlapError leaves a public call, and exceptions of the caller's own functions.

Expected errors are translated where they happen, with a message that names the object concerned
(:func:`onlap.errors.from_oserror`). This is for the rest: a stat that was not expected to fail, a module that cannot be
imported for lack of descriptors. An error of the kernel that was translated where nobody knew the caller's name for it
is given that name here.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from types import FunctionType, GeneratorType, TracebackType
from typing import Any, TypeVar

from onlap import errors
from onlap.errors import from_oserror, shown

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])

_RAW = (OSError, ImportError, MemoryError, RuntimeError, AssertionError, UnicodeError)
_CALLERS_OWN = "_onlap_callers_own"

# What functions do whose names are not verbs, for messages.
_DOING = {
    "__init__": "open the root",
    "ContentStore.put": "store a blob",
    "mounted": "mount",
    "mounts": "plan the mounts",
    "scratch": "make a scratch tree",
    "usage": "measure",
    "changes": "compare",
    "diff": "compare",
    "images": "use images",
    "content": "use blobs",
}


_SPECIAL = ("__enter__", "__exit__", "__contains__", "__getitem__", "__iter__", "__len__")


def _raw() -> tuple[type[BaseException], ...]:
    # Imported by then if it can have raised anything.
    sqlite3 = sys.modules.get("sqlite3")
    return _RAW if sqlite3 is None else (*_RAW, sqlite3.Error)


def mark_callers_own(error: BaseException) -> None:
    """Mark an exception of a caller's own function, which is raised unchanged."""
    setattr(error, _CALLERS_OWN, True)


def public_class(cls: type[C]) -> type[C]:
    """Guard all public methods and properties of a class, and those of its special methods that do something."""
    for name, value in list(vars(cls).items()):
        if name.startswith("_") and name not in _SPECIAL:
            continue
        if isinstance(value, FunctionType):
            setattr(cls, name, public(value))
        elif isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(public(value.fget), value.fset, value.fdel, value.__doc__))
    return cls


def public(function: F) -> F:
    """Guard a function, and the iterator or context manager that it returns."""
    name = function.__name__
    doing = _DOING.get(function.__qualname__) or _DOING.get(name) or name.strip("_").replace("_", " ")

    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            found = function(*arguments, **named)
        except _raw() as error:
            if hasattr(error, _CALLERS_OWN):
                raise
            raise _translated(error, _Call(doing, arguments, named)) from error
        except errors.OnlapError as error:
            _Call(doing, arguments, named).name(error)
            raise
        if isinstance(found, GeneratorType):
            return _steps(found, _Call(doing, arguments, named))
        if isinstance(found, AbstractContextManager) and hasattr(found, "gen"):  # contextlib.contextmanager's
            return _Block(found, _Call(doing, arguments, named))
        return found

    return guarded  # type: ignore[return-value]


class _Call:
    """A call of a public function, for messages."""

    __slots__ = ("_arguments", "_doing", "_named")

    def __init__(self, doing: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._doing = doing
        self._arguments = arguments
        self._named = named

    @property
    def subject(self) -> str | None:
        """What it was called for: the first text, path or thing with a name among the arguments."""
        for each in (*self._arguments[:3], *self._named.values()):
            name = each if isinstance(each, (str, os.PathLike)) else getattr(each, "name", None)
            if isinstance(name, (str, os.PathLike)):
                return str(name)
        return None

    def __str__(self) -> str:
        subject = self.subject
        return f"cannot {self._doing}" + (f" {shown(subject)}" if subject else "")

    def name(self, error: errors.OnlapError) -> None:
        """Name the subject in an error that comes from the kernel and has no key."""
        if error.key is not None or not isinstance(error.__cause__, _raw()):
            return
        subject = self.subject
        if not subject:
            return
        error.key = subject
        if shown(subject) not in error.message:
            error.message = f"{self}: {error.message}"


def _steps(inner: Generator[Any, Any, Any], call: _Call) -> Iterator[Any]:
    try:
        while True:
            try:
                step = next(inner)
            except StopIteration:
                return
            except _raw() as error:
                if hasattr(error, _CALLERS_OWN):
                    raise
                raise _translated(error, call) from error
            except errors.OnlapError as error:
                call.name(error)
                raise
            yield step
    finally:
        inner.close()


class _Block(AbstractContextManager[Any]):
    def __init__(self, inner: AbstractContextManager[Any], call: _Call) -> None:
        self._inner = inner
        self._call = call

    def __enter__(self) -> Any:
        try:
            return self._inner.__enter__()
        except _raw() as error:
            raise _translated(error, self._call) from error
        except errors.OnlapError as error:
            self._call.name(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, raised, traceback)
        except _raw() as error:
            if error is raised or hasattr(error, _CALLERS_OWN):
                raise
            raise _translated(error, self._call) from error
        except errors.OnlapError as error:
            if error is not raised:
                self._call.name(error)
            raise


def _translated(error: BaseException, call: _Call) -> errors.OnlapError:
    key = call.subject
    if isinstance(error, OSError):
        return from_oserror(error, doing=str(call).removeprefix("cannot "), key=key)
    if isinstance(error, (MemoryError, RecursionError)):
        return errors.ResourceExhausted(f"{call}: {str(error) or 'out of memory'}", key=key)
    if isinstance(error, ImportError):
        return errors.Unavailable(
            f"{call}: {error}", key=key, hint="check the installation, and the limits of descriptors and memory"
        )
    if "can't start new thread" in str(error):
        return errors.ResourceExhausted(f"{call}: {error}", key=key, hint="raise the limit on threads (ulimit -u)")
    return errors.Internal(f"{call}: {type(error).__name__}: {error}", key=key, hint="please report it")
