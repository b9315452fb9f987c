"""Fingerprints: what a captured directory looked like to stat(2), so that the next capture reads only what changed.

::

    ROOT/snapshots/<id>/about/captured   beside the tree of the capture

The file is a line with a digest of the rest, then numbers and names, in the byte order of the machine. It is as good as
a copy of the directory's metadata, and is read as a whole in a few milliseconds. One that is damaged counts as missing.

A file is taken for unchanged if its type, mode, inode, size and both its times are the same. Nobody can set a ctime, so
a change that keeps the rest is seen too. It is not seen if it happened within the same tick of the kernel's clock as
the reading; so entries that were that young keep no ctime here, and count as changed the next time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_MAGIC = b"onlap captured 1 "
# When it was taken, and how many directories follow.
_HEAD = struct.Struct("=qQ")
# Bytes of a directory's path, bytes of its names, and how many rows follow.
_DIRECTORY = struct.Struct("=QQQ")
_NUMBER = 8

# The numbers of a row: st_mode, st_ino, st_size, st_mtime_ns, st_ctime_ns. The first row is the directory's own, with
# its st_dev for a size. Of a subdirectory the parent has only the type: the rest is in its own first row.
WIDTH = 5
MODE, INODE, SIZE, MTIME, CTIME = range(WIDTH)
ROW = WIDTH * _NUMBER
SUBDIRECTORY = (stat.S_IFDIR, 0, 0, 0, 0)
_MOUNTPOINT = (stat.S_IFDIR | 0o700, 0, 0, 0, 0)
# st_ino has 64 bits without a sign.
_POSITIVE = (1 << 63) - 1


class Listed(NamedTuple):
    """One directory.

    Attributes:
        names: of its entries, sorted, each but the last followed by a NUL.
        rows: the numbers of the directory and of each entry, see :data:`WIDTH`.
    """

    names: bytes
    rows: bytes

    def each(self) -> Iterator[tuple[str, bytes]]:
        """The entries: name and row."""
        return zip(self.split(), (self.rows[at : at + ROW] for at in range(ROW, len(self.rows), ROW)), strict=False)

    def split(self) -> list[str]:
        """The names."""
        return os.fsdecode(self.names).split("\0") if self.names else []

    @property
    def own(self) -> bytes:
        """The row of the directory itself."""
        return self.rows[:ROW]


NOTHING = Listed(b"", b"")
MOUNTPOINT = Listed(b"", array("q", _MOUNTPOINT).tobytes())

# By the path from the top of the captured directory, which itself is "".
Directories = Mapping[str, Listed]


class Fingerprint(NamedTuple):
    """What a captured directory looked like.

    Attributes:
        taken_ns: when that was, by the kernel's clock.
        directories: all directories in it.
    """

    taken_ns: int
    directories: Directories

    def is_of(self, device: int) -> bool:
        """Whether the directory was on a device; its number may change with a reboot."""
        return numbers(self.directories[""].own)[SIZE] == device


def numbers(row: bytes) -> array[int]:
    """The numbers of one or several rows."""
    found = array("q")
    found.frombytes(row)
    return found


def row_of(status: os.stat_result) -> bytes:
    """The row of a file that is not a directory."""
    return packed([status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def directory_row(status: os.stat_result) -> list[int]:
    """The numbers of a directory's own row."""
    return [status.st_mode, status.st_ino, status.st_dev, status.st_mtime_ns, status.st_ctime_ns]


def packed(values: list[int]) -> bytes:
    """Numbers as they are in a file."""
    try:
        return array("q", values).tobytes()
    except OverflowError:
        return array("q", [value & _POSITIVE if value > _POSITIVE else value for value in values]).tobytes()


def encode(fingerprint: Fingerprint, now_ns: int) -> list[bytes]:
    """The content of a file, in pieces.

    Args:
        fingerprint: what to write.
        now_ns: entries with this ctime or a later one, from the future, count as changed at the next capture.
    """
    parts = [_HEAD.pack(fingerprint.taken_ns, len(fingerprint.directories))]
    for path, listed in fingerprint.directories.items():
        name, rows = os.fsencode(path), listed.rows
        values = numbers(rows)
        if max(values[CTIME::WIDTH]) >= now_ns:
            for at in range(CTIME, len(values), WIDTH):
                if values[at] >= now_ns:
                    values[at] = -1
            rows = values.tobytes()
        parts += (_DIRECTORY.pack(len(name), len(listed.names), len(rows) // ROW), name, listed.names, rows)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [_MAGIC + f"{sys.byteorder} {digest.hexdigest()}\n".encode(), *parts]


def decode(data: bytes) -> Fingerprint | None:
    """A fingerprint from the content of its file; None if it is damaged or another machine's."""
    start = data.find(b"\n") + 1
    content = memoryview(data)[start:]
    if data[:start] != _MAGIC + f"{sys.byteorder} {hashlib.sha256(content).hexdigest()}\n".encode():
        return None
    # It has our digest, so it is as we wrote it; an older Onlap might have written it otherwise.
    try:
        return _parse(data, start)
    except (struct.error, ValueError):
        return None


def _parse(data: bytes, at: int) -> Fingerprint:
    taken_ns, count = _HEAD.unpack_from(data, at)
    at += _HEAD.size
    directories = {}
    for _ in range(count):
        path, names, rows = _DIRECTORY.unpack_from(data, at)
        at += _DIRECTORY.size
        middle, end = at + path + names, at + path + names + rows * ROW
        if end > len(data):
            raise ValueError("it is too short")
        listed = Listed(data[at + path : middle], data[middle:end])
        if rows != (listed.names.count(b"\0") + 2 if listed.names else 1):
            raise ValueError("it has other names than rows")
        directories[os.fsdecode(data[at : at + path])] = listed
        at = end
    if at != len(data) or "" not in directories:
        raise ValueError("it is too long, or lacks its top")
    return Fingerprint(taken_ns, directories)
