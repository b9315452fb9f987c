"""How a system call is made: libc through ctypes, errno turned into OSError.

``use_errno`` keeps a private copy of errno a thread, so that a switch of threads between the call and its reading
cannot mix them up. A call releases the GIL.
"""

from __future__ import annotations

import ctypes
import os
import sys

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Numbers of system calls that came with or after Linux 5.0 are the same on all architectures
# (arch/*/entry/syscalls: "unified" from 424 on).
OPEN_TREE = 428
MOVE_MOUNT = 429
FSOPEN = 430
FSCONFIG = 431
FSMOUNT = 432
OPENAT2 = 437
MOUNT_SETATTR = 442


def _symbol(name: str) -> ctypes._NamedFuncPointer:
    if _libc is None:
        raise OSError(38, "Onlap's system calls are Linux's")
    return getattr(_libc, name)  # type: ignore[no-any-return]


def call(name: str, *args: object, path: object = None) -> int:
    """Call libc's ``name``; raise OSError about ``path`` when it answers -1."""
    function = _symbol(name)
    result: int = function(*args)
    if result == -1:
        raise _error(path)
    return result


def syscall(number: int, *args: object, path: object = None) -> int:
    """Make system call ``number``; every int argument is passed as a C long, as the kernel takes them."""
    function = _symbol("syscall")
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result: int = function(ctypes.c_long(number), *converted)
    if result == -1:
        raise _error(path)
    return result


def _error(path: object) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path) if path is not None else OSError(number, os.strerror(number))


def fspath(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    """``path`` as the kernel takes it; ValueError when it holds a NUL, which C would cut at."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded
