"""What is mounted: /proc/<pid>/mountinfo, read as bytes.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap.overlayfs.options import octal_unescape


class Entry(NamedTuple):
    """One line of mountinfo; ``super_options`` still has the kernel's octal escapes, which keep its commas apart."""

    id: int
    parent: int
    device: bytes
    root: bytes
    mountpoint: bytes
    options: bytes
    fstype: bytes
    source: bytes
    super_options: bytes


def parse(text: bytes) -> Iterator[Entry]:
    """The entries of a mountinfo file, in its order."""
    for line in text.splitlines():
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        fstype, source, super_options = after.split(b" ", 2)
        yield Entry(
            int(fields[0]),
            int(fields[1]),
            fields[2],
            octal_unescape(fields[3]),
            octal_unescape(fields[4]),
            fields[5],
            fstype,
            octal_unescape(source),
            super_options,
        )


def read(pid: int | str = "self") -> list[Entry]:
    """The mounts that ``pid`` sees; empty when it is gone or hides them from us."""
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            return list(parse(file.read()))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    except OSError as error:
        # EINVAL: the process is a zombie and has no mount namespace any more (fs/proc_namespace.c).
        if error.errno == errno.EINVAL:
            return []
        raise


def pids() -> list[int]:
    """The processes of this machine that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


class Namespace(NamedTuple):
    """A mount namespace, as one of the processes in it sees it."""

    pid: int
    entries: list[Entry]


def namespaces() -> Iterator[Namespace]:
    """Every mount namespace that a visible process is in, each once."""
    seen: set[str] = set()
    for pid in pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            # ENOENT, ESRCH: it ended. EACCES: another user's process, whose mounts we may not see; as an ordinary
            # user we could not have mounts of our trees in it either, but for those that its owner made himself.
            continue
        if namespace in seen:
            continue
        seen.add(namespace)
        yield Namespace(pid, read(pid))


def below(directory: bytes) -> list[bytes]:
    """Where something is mounted below a directory, in the order of mounting: what is deeper comes later."""
    return [entry.mountpoint for entry in read() if entry.mountpoint.startswith(directory + b"/")]


def mount_of(path: bytes) -> Entry:
    """The mount that a file is on.

    Args:
        path: absolute, without symlinks.
    """
    best = Entry(0, 0, b"", b"/", b"/", b"", b"", b"", b"")
    for entry in read():
        inside = path == entry.mountpoint or path.startswith(entry.mountpoint.rstrip(b"/") + b"/")
        # Of mounts on top of one another the last one is seen.
        if inside and len(entry.mountpoint) >= len(best.mountpoint):
            best = entry
    return best


def path_within(mount: Entry, path: bytes) -> bytes:
    """Where a file lies from the root of its filesystem, as the ``root`` of a bind mount of it would show."""
    rest = path[len(mount.mountpoint.rstrip(b"/")) :]
    return (mount.root.rstrip(b"/") + rest) or b"/"
