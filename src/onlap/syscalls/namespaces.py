"""unshare(2) and setns(2), which the standard library has only from Python 3.12 on, and what goes with them.

Sources: unshare(2), setns(2), user_namespaces(7); include/uapi/linux/sched.h.
"""

from __future__ import annotations

import ctypes

from onlap.syscalls import _libc

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000

_PR_SET_DUMPABLE = 4


def unshare(flags: int) -> None:
    """Give the calling thread namespaces (or, with CLONE_FS, a working directory) of its own."""
    _libc.call("unshare", ctypes.c_int(flags))


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace that ``fd`` is of."""
    _libc.call("setns", ctypes.c_int(fd), ctypes.c_int(kind))


def set_dumpable(dumpable: bool) -> None:
    """prctl(PR_SET_DUMPABLE): whether /proc/self is this process's user's; a change of user makes it root's.

    Source: prctl(2), proc(5); include/uapi/linux/prctl.h.
    """
    _libc.call("prctl", ctypes.c_int(_PR_SET_DUMPABLE), ctypes.c_ulong(dumpable), *[ctypes.c_ulong(0)] * 3)
