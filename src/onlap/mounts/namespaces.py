"""The processes and mount namespaces of this machine, as far as they can be trusted.

A user who creates a user namespace may mount in it, and so controls its mountinfo: an overlay whose ``upperdir`` looks
like one of ours, or 100,000 binds. Our trees can only be mounted by root and by ourselves (``ROOT`` is closed to
others), so the namespaces of all others are skipped. Nothing is looked up through ``/proc/<pid>/root``: a filesystem
there may be another user's FUSE, which need not answer.

Sources: ioctl_nsfs(2), user_namespaces(7), proc_pid_root(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from onlap.syscalls.namespaces import owner_of

# A mount table shows only what is below its process's root. If all processes seen so far in a namespace have changed
# theirs, at most this many tables are read: a process that may call chroot(2) could otherwise make it take for ever.
_MAX_ROOTS = 16


def pids() -> list[int]:
    """The processes of this machine that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status(pid: int) -> dict[str, str]:
    """The fields of a process's status (proc_pid_status(5)); empty if it is gone."""
    # Not in text mode: a process chooses its name, and a carriage return in it does not end the line.
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def name_of(pid: int | str) -> str | None:
    """The name of a process's mount namespace, as ``mnt:[4026531841]``; None if it has ended or is hidden from us."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def tables() -> Iterator[bytes]:
    """The mountinfo of every mount namespace that has a process and belongs to root or to this process's user."""
    for _, text in tables_of_processes():
        yield text


def tables_of_processes() -> Iterator[tuple[int | None, bytes]]:
    """The same, each with a process in that namespace; None for the namespace of this process."""
    done: set[str] = set()
    roots: dict[str, set[bytes]] = {}
    own = name_of("self")
    for pid in pids():
        name = name_of(pid)
        if name is None or name in done:
            continue
        found = table(pid, roots.setdefault(name, set()), own)
        if found is None:
            continue
        name, text, whole = found
        if whole or len(roots.setdefault(name, set())) >= _MAX_ROOTS:
            done.add(name)
        if text:
            yield None if name == own else pid, text


def members(matches: Callable[[bytes], bool]) -> list[int]:
    """The processes in mount namespaces, other than this one's, whose mountinfo matches."""
    known: dict[str, bool] = {name: False for name in (name_of("self"),) if name is not None}
    found = []
    for pid in pids():
        name = name_of(pid)
        if name is None:
            continue
        if name not in known:
            read = table(pid)
            if read is None:
                continue
            known[name] = matches(read[1])
        if known[name]:
            found.append(pid)
    return found


def table(pid: int, seen: set[bytes] | None = None, own: str | None = None) -> tuple[str, bytes, bool] | None:
    """The mount table of a process.

    Args:
        pid: the process.
        seen: the process roots whose tables have been read; its own is added, and its table read only if it is new.
        own: the name of this process's namespace, if the caller has it.

    Returns:
        The name of its mount namespace; its mountinfo, empty if it is not trusted; whether the table is complete, so
        that no other process of the namespace is needed. None if the process has ended or is hidden from us.
    """
    try:
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # The table is that of the process's namespace when the file is opened. A process may move from our namespace
        # into one that it created, but not back: so the namespace afterwards decides. The open directory belongs to
        # this process, even if its pid is reused.
        mountinfo = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        # Unbuffered, which spares some system calls per process.
        with open(mountinfo, "rb", buffering=0) as file:
            name = os.readlink("ns/mnt", dir_fd=process)
            if name != (own or name_of("self")) and not _is_trusted(process):
                return name, b"", True
            root = os.readlink(b"root", dir_fd=process)
            if seen is not None:
                if root in seen:
                    return name, b"", False
                seen.add(root)
            text = file.readall()
    except OSError:
        # Whatever prevents reading another process: it ended (ENOENT, ESRCH, EINVAL), or it is hidden (EACCES).
        return None
    finally:
        os.close(process)
    # Empty: its root is outside the namespace, and its path says nothing.
    return name, text, bool(text) and root == b"/"


def _is_trusted(process: int) -> bool:
    """Whether the namespace of a process, which is not ours, belongs to root or to this user."""
    fd = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    try:
        owner = owner_of(fd)
    except OSError as error:
        # EPERM: it belongs to a namespace above ours, of which we only see our own user's processes.
        return error.errno == errno.EPERM
    finally:
        os.close(fd)
    return owner in (0, os.geteuid())
