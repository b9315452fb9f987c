"""How a system call is made: libc through ctypes, errno turned into OSError.

``use_errno`` keeps a private copy of errno per thread, so that a thread switch between the call and reading errno
cannot mix them up. A call releases the GIL.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

# System calls of Linux 5.0 and later have the same numbers on all architectures (arch/*/entry/syscalls: "unified" from
# 424 on).
OPEN_TREE = 428
MOVE_MOUNT = 429
FSOPEN = 430
FSCONFIG = 431
FSMOUNT = 432
OPENAT2 = 437
MOUNT_SETATTR = 442


def call(name: str, *args: object, path: object = None) -> int:
    """Call libc's ``name``; raise OSError about ``path`` if it returns -1."""
    result: int = getattr(_libc, name)(*args)
    if result == -1:
        raise _error(path)
    return result


def syscall(number: int, *args: object, path: object = None) -> int:
    """Make system call ``number``; every int argument is passed as a C long, as the kernel takes them."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return call("syscall", ctypes.c_long(number), *converted, path=path)


def _error(path: object) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path) if path is not None else OSError(number, os.strerror(number))


def fspath(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    """``path`` as the kernel takes it; ValueError if it contains a NUL, where C would cut it."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded
