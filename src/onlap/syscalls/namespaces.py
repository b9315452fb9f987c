"""unshare(2), which the standard library has since Python 3.12, and related calls.

Sources: unshare(2), user_namespaces(7), ioctl_nsfs(2); include/uapi/linux/{sched,nsfs}.h.
"""

from __future__ import annotations

import ctypes
import os
import struct

from onlap.syscalls import _libc

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36  # Linux 3.4
_PR_CAP_AMBIENT = 47  # Linux 4.3
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522
_NS_GET_USERNS = 0xB701  # Linux 4.9
_NS_GET_OWNER_UID = 0xB704  # Linux 4.11


def unshare(flags: int) -> None:
    """Give the calling thread its own namespaces (or, with CLONE_FS, its own working directory)."""
    _libc.call("unshare", ctypes.c_int(flags))


def in_user_namespace() -> bool:
    """Whether this process is in a user namespace other than the initial one.

    The initial one maps all ids in one line (user_namespaces(7)); there is no other sign.
    """
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return file.read().split() != [b"0", b"0", b"4294967295"]
    except FileNotFoundError:  # a kernel without user namespaces
        return False


def owner_of(fd: int) -> int:
    """The user who created the user namespace that owns a namespace (an open ``/proc/<pid>/ns/mnt``).

    Raises:
        OSError: EPERM if that user namespace is neither ours nor below it.
    """
    import fcntl

    owner = fcntl.ioctl(fd, _NS_GET_USERNS)
    try:
        # uid_t is an unsigned int.
        return int(struct.unpack("I", fcntl.ioctl(owner, _NS_GET_OWNER_UID, bytes(4)))[0])
    finally:
        os.close(owner)


def set_dumpable() -> None:
    """prctl(PR_SET_DUMPABLE): give /proc/self back to this process's user, after a change of user gave it to root.

    Source: prctl(2), proc(5); include/uapi/linux/prctl.h.
    """
    _prctl(_PR_SET_DUMPABLE, 1)


def hide_process() -> None:
    """prctl(PR_SET_DUMPABLE): keep this process's memory, environment and links in /proc from its user's programs."""
    _prctl(_PR_SET_DUMPABLE, 0)


def end_with_parent(number: int) -> None:
    """prctl(PR_SET_PDEATHSIG): get this signal when the thread ends that forked this process."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): become the parent of descendants whose own parent has ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def keep_capabilities() -> None:
    """Let a program that this process becomes keep its capabilities, whoever its user is (the ambient set).

    Source: capset(2), capabilities(7), PR_CAP_AMBIENT in prctl(2); include/uapi/linux/capability.h.
    """
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(struct.calcsize("6I"))
    _libc.call("capget", header, data)
    sets = struct.unpack("6I", data.raw)
    # Each half has the effective, the permitted and the inheritable ones; an ambient one must be in the last two.
    _libc.call("capset", header, struct.pack("6I", sets[0], sets[1], sets[1], sets[3], sets[4], sets[4]))
    permitted = sets[1] | sets[4] << 32
    for number in range(64):
        if permitted >> number & 1:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)


def _prctl(option: int, value: int, third: int = 0) -> None:
    rest = (third, 0, 0)
    _libc.call("prctl", ctypes.c_int(option), ctypes.c_ulong(value), *map(ctypes.c_ulong, rest))
