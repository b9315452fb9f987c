"""What is mounted: /proc/<pid>/mountinfo, read as bytes.

Other users' mount points, labels and options are in it, so nothing in it may stop the parser: the kernel escapes
space, tab, newline and backslash, and leaves every other byte unchanged (fs/proc_namespace.c, mangle). Only ``b"\\n"``
ends a line: ``splitlines`` and files in text mode would also split at a carriage return.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap.overlayfs.options import octal_unescape
from onlap.syscalls.files import mount_id


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


class Place(NamedTuple):
    """Where a file is, independent of mounts: its filesystem's device number, and the path from its root."""

    device: bytes
    path: bytes


def parse(text: bytes, *needles: bytes) -> Iterator[Entry]:
    """The entries of a mountinfo file, in its order; malformed lines are skipped.

    Args:
        text: the file.
        needles: parse only the lines that contain one of these; for 20,000 mounts this takes milliseconds.
    """
    if needles and not any(needle in text for needle in needles):
        return
    for line in text.split(b"\n"):
        if needles and not any(needle in line for needle in needles):
            continue
        before, _, after = line.partition(b" - ")
        fields, filesystem = before.split(b" "), after.split(b" ", 2)
        if len(fields) < 6 or len(filesystem) < 3 or not (fields[0].isdigit() and fields[1].isdigit()):
            continue
        yield Entry(
            int(fields[0]),
            int(fields[1]),
            fields[2],
            octal_unescape(fields[3]),
            octal_unescape(fields[4]),
            fields[5],
            filesystem[0],
            octal_unescape(filesystem[1]),
            filesystem[2],
        )


def own() -> bytes:
    """This process's mountinfo."""
    with open("/proc/self/mountinfo", "rb") as file:
        return file.read()


def below(directory: bytes) -> list[bytes]:
    """The mount points below a directory, in the order of mounting: deeper ones come later."""
    return [entry.mountpoint for entry in parse(own()) if entry.mountpoint.startswith(directory + b"/")]


def place_of(path: str) -> Place | None:
    """Where a directory of this process is; None if its mount is in no table (outside a chroot, or detached).

    Args:
        path: absolute, without symlinks.

    Raises:
        OSError: it does not exist.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mount = mount_of(fd)
    finally:
        os.close(fd)
    return None if mount is None else _place(mount, os.fsencode(path))


def mount_of(fd: int) -> Entry | None:
    """The mount that an open file is on; None if it is not in this process's table."""
    # By its id: a mount on top of another, or hidden by it, has the same path.
    number = mount_id(fd)
    return next((entry for entry in parse(own(), b"%d " % number) if entry.id == number), None)


def _place(mount: Entry, path: bytes) -> Place:
    rest = path[len(mount.mountpoint.rstrip(b"/")) :]
    return Place(mount.device, (mount.root.rstrip(b"/") + rest).rstrip(b"/") or b"/")


class Table:
    """The mounts of a namespace, for finding where a path leads there without touching it.

    They are parsed once, for the first path: there may be thousands.

    Args:
        text: the mountinfo of a process in it.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The mounts."""
        return list(parse(self._text))

    @functools.cached_property
    def _on(self) -> dict[tuple[int, bytes], Entry]:
        """What is mounted on a mount, by its id and the mount point."""
        return {(entry.parent, entry.mountpoint): entry for entry in self.entries if entry.parent != entry.id}

    @functools.cached_property
    def _tops(self) -> dict[bytes, Entry]:
        """The mounts that are on no other one of the table, by their mount points."""
        ids = {entry.id for entry in self.entries}
        tops: dict[bytes, Entry] = {}
        for entry in self.entries:
            if entry.parent not in ids or entry.parent == entry.id:
                tops.setdefault(entry.mountpoint, entry)
        return tops

    def place(self, path: bytes) -> Place | None:
        """Where an absolute path leads, ignoring symlinks; None if no mount in the table contains it."""
        points = [b"/", *(path[:end] for end in range(1, len(path)) if path[end] == _SLASH), path]
        mount = next((self._tops[point] for point in reversed(points) if point in self._tops), None)
        if mount is None:
            return None
        # Down from mount to mount, as the kernel does: mounts below a mount point that was covered later are not met.
        passed = {mount.id}
        for point in points:
            while (upper := self._on.get((mount.id, point))) is not None and upper.id not in passed:
                passed.add(upper.id)
                mount = upper
        return _place(mount, path)

    def path(self, place: Place) -> bytes | None:
        """A path that leads to a place; None if none does."""
        for entry in self.entries:
            if entry.device == place.device and (rest := relative_to(place.path, entry.root)) is not None:
                path = entry.mountpoint.rstrip(b"/") + rest
                if self.place(path) == place:
                    return path
        return None


def relative_to(path: bytes, above: bytes) -> bytes | None:
    """What follows a directory in a path that is in it, with its slash; empty for itself, None for another."""
    above = above.rstrip(b"/")
    rest = path[len(above) :]
    return rest if path.startswith(above) and rest[:1] in (b"", b"/") else None


_SLASH = ord("/")
