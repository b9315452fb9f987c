"""The processes and mount namespaces of this machine, as far as their word can be taken.

Whoever makes a user namespace may mount in it, and so decides what is read of it: an overlay whose ``upperdir`` reads
like one of ours, or 100,000 binds. Our trees can be mounted only by root and by ourselves (``ROOT`` is closed to
others), so that the namespaces of all others are passed over. Nothing is ever looked up through ``/proc/<pid>/root``:
a filesystem there may be another's FUSE, which need not answer.

Sources: ioctl_nsfs(2), user_namespaces(7), proc_pid_root(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from onlap.syscalls.namespaces import owner_of

# A mount table shows what lies below its process's root. Of a namespace in which all processes that we met have changed
# theirs we read as many tables; more would let one who may call chroot(2) decide how long it takes.
_MAX_ROOTS = 16


def pids() -> list[int]:
    """The processes of this machine that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status(pid: int) -> dict[str, str]:
    """The fields of a process's status (proc_pid_status(5)), without their names' colons; empty when it is gone."""
    # The process's own name is its choice, and a carriage return in it is no end of a line: so not as text.
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def name_of(pid: int | str) -> str | None:
    """The name of a process's mount namespace, as ``mnt:[4026531841]``; None when it ended or is hidden from us."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def tables() -> Iterator[bytes]:
    """The mountinfo of every mount namespace that belongs to root or to this process's user, and has a process."""
    done: set[str] = set()
    roots: dict[str, set[bytes]] = {}
    for pid in pids():
        name = name_of(pid)
        if name is None or name in done:
            continue
        found = table(pid, roots.setdefault(name, set()))
        if found is None:
            continue
        name, text, whole = found
        if whole or len(roots.setdefault(name, set())) >= _MAX_ROOTS:
            done.add(name)
        if text:
            yield text


def table(pid: int, seen: set[bytes] | None = None) -> tuple[str, bytes, bool] | None:
    """The mount table of a process.

    Args:
        pid: the process.
        seen: the roots of whom the tables were read already; its own is added, and its table read only if it is new.

    Returns:
        The name of its mount namespace; its mountinfo, empty where its word is not taken; whether no other process of
        the namespace can tell more. None when it ended, or is hidden from us.
    """
    try:
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # The table is that of the namespace in which the process is when the file is opened. It may leave ours for one
        # that it made, and not come back: so what it is in afterwards decides. The directory is of this process alone,
        # also when its number is given to another.
        mountinfo = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        with open(mountinfo, "rb") as file:
            name = os.readlink("ns/mnt", dir_fd=process)
            if not _is_trusted(process, name):
                return name, b"", True
            root = os.readlink(b"root", dir_fd=process)
            if seen is not None:
                if root in seen:
                    return name, b"", False
                seen.add(root)
            text = file.read()
    except OSError:
        # Whatever keeps another's process from being read: it ended (ENOENT, ESRCH, EINVAL), it is hidden (EACCES).
        return None
    finally:
        os.close(process)
    # Empty: its root lies outside the namespace, and what it is called says nothing.
    return name, text, bool(text) and root == b"/"


def _is_trusted(process: int, name: str) -> bool:
    if name == name_of("self"):
        return True
    fd = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    try:
        owner = owner_of(fd)
    except OSError as error:
        # EPERM: it belongs to a namespace above our own, and only our own user's processes of those are shown to us.
        return error.errno == errno.EPERM
    finally:
        os.close(fd)
    return owner in (0, os.geteuid())
