"""Errors at the places where they can come from: in the calls that Onlap's own code makes.

Of sys.monitoring's events (Python 3.12) those of a call come before it is made, in all threads, and what is raised then
is raised where the call is.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import onlap
from onlap import errors

_monitoring: Any = getattr(sys, "monitoring", None)
_TOOL = 4  # none of those that Python names for a purpose
_HERE = os.path.dirname(onlap.__file__)
# Where an error is translated, raised for others or cleaned up behind: what comes there comes from elsewhere.
_NOT_HERE = ("errors.py", "boundary.py")


class Fault(NamedTuple):
    """A kind of error.

    Attributes:
        error: makes one.
        comes_from: whether a call of this can raise it.
        anywhere: whether also in threads that Onlap started; else in the caller's alone.
    """

    error: Callable[[], Exception]
    comes_from: Callable[[object], bool]
    anywhere: bool = True


def _module(called: object) -> str:
    owner = getattr(called, "__objclass__", None) or getattr(called, "__self__", None)
    if isinstance(owner, types.ModuleType):
        return owner.__name__
    if owner is not None:
        return (owner if isinstance(owner, type) else type(owner)).__module__
    return str(getattr(called, "__module__", ""))


# These make no system call that can fail; and a file that cannot be closed is closed.
_NEVER_FAIL = {
    "getpid", "geteuid", "getegid", "getuid", "getgid", "umask", "fspath", "register_at_fork", "_exit", "close",
    "__enter__", "__exit__", "fileno", "cpu_count", "WEXITSTATUS", "minor", "major", "makedev", "device_encoding",
}  # fmt: skip


def _is_of_the_kernel(called: object) -> bool:
    if isinstance(called, type) or getattr(called, "__name__", "") in _NEVER_FAIL:
        return False
    return _module(called) in ("posix", "fcntl", "_io", "select", "_socket", "_posixsubprocess")


def _is_of_sqlite(called: object) -> bool:
    # Not those that fetch rows: SQLite ends a statement that fails, which would go on here.
    name = getattr(called, "__name__", "")
    return _module(called) in ("sqlite3", "_sqlite3") and name in ("connect", "execute", "executemany")


def _takes_memory(called: object) -> bool:
    return isinstance(called, (types.FunctionType, types.MethodType, type))


def _is_of_unicode(called: object) -> bool:
    return called in (os.fsencode, os.fsdecode, str.encode, bytes.decode)


def _os_error(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


def _sqlite_error() -> Exception:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return error


FAULTS = {
    **{
        name: Fault(_os_error(getattr(errno, name)), _is_of_the_kernel)
        for name in ("EIO", "EMFILE", "EACCES", "ESTALE", "ENOENT")
    },
    "sqlite3.Error": Fault(_sqlite_error, _is_of_sqlite),
    "MemoryError": Fault(MemoryError, _takes_memory, anywhere=False),
    "RecursionError": Fault(lambda: RecursionError("maximum recursion depth exceeded"), _takes_memory, anywhere=False),
    "UnicodeError": Fault(
        lambda: UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), _is_of_unicode
    ),
}


class Injection:
    """Raises a fault before the nth call that it can come from, in a ``with`` block.

    Args:
        fault: which.
        number: n, from 1; 0 for none at all.

    Attributes:
        count: how many such calls there were.
        place: where it was raised; empty if it was not.
    """

    def __init__(self, fault: Fault, number: int) -> None:
        self._fault = fault
        self._number = number
        self._thread = threading.get_ident()
        self.count = 0
        self.place = ""

    def __enter__(self) -> Injection:
        _monitoring.use_tool_id(_TOOL, "faults")
        _monitoring.register_callback(_TOOL, _monitoring.events.CALL, self._called)
        _monitoring.set_events(_TOOL, _monitoring.events.CALL)
        return self

    def __exit__(self, *_: object) -> None:
        _monitoring.set_events(_TOOL, 0)
        _monitoring.free_tool_id(_TOOL)

    def _called(self, code: types.CodeType, _offset: int, called: object, _argument: object) -> object:
        if not code.co_filename.startswith(_HERE) or code.co_filename.endswith(_NOT_HERE):
            return _monitoring.DISABLE
        if not self._fault.anywhere and threading.get_ident() != self._thread:
            return None
        if self._fault.comes_from(called):
            self.count += 1
            if self.count == self._number:
                self.place = f"{code.co_filename}: {code.co_qualname}"
                raise self._fault.error()
        return None


def tried(arrange: Callable[[], Any], act: Callable[[Any], object], fault: str, number: int) -> int:
    """Do a public call with a fault at its nth place; at how many it might have come.

    Args:
        arrange: called before, undisturbed.
        act: the call, given what that returned.
        fault: its name.
        number: n, from 1; 0 for none at all.

    Raises:
        Exception: whatever leaves the call and is not an OnlapError.
    """
    given = arrange()
    injection = Injection(FAULTS[fault], number)
    try:
        with injection:
            act(given)
    except errors.OnlapError:
        pass
    except BaseException as error:
        error.add_note(f"{fault} at {number}: {injection.place}")
        raise
    return injection.count


def spread(count: int, most: int) -> list[int]:
    """Numbers from 1 to ``count``, evenly, no more than so many."""
    return sorted({1 + (count - 1) * at // max(1, most - 1) for at in range(most)}) if count else []


def public_names(kind: type) -> set[str]:
    """All that a caller may use of a class, in the way of a call or of a property."""
    special = ("__init__", "__enter__", "__exit__", "__contains__", "__getitem__", "__iter__", "__len__")
    names = {name for base in kind.__mro__ if base.__module__.startswith("onlap.") for name in vars(base)}
    chosen = {name for name in names if not name.startswith("_") or name in special}
    values = {name: getattr(kind, name) for name in chosen}
    return {name for name, value in values.items() if callable(value) or isinstance(value, property)}
