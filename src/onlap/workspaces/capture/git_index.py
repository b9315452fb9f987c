"""Git's index: the stats in it, exchanged for those of the copies of the files.

Git keeps a file for unchanged, without reading it, if its stats are those in the index. A copy has another inode and
another ctime; so in a copied work tree the first ``git status`` reads all files.

Only the stats of a file that git would take for unchanged are exchanged: those that are exactly what the file shows. A
file that is as young as the index ("racy") stays as it is, and git reads it, as it does in the original. What cannot be
read in full, or is unusual, is left alone: then git reads the files, and nothing is wrong.

Source: Documentation/gitformat-index.txt and racy-git.txt of git 2.47; read-cache.c, ``match_stat_data``,
``is_racy_timestamp`` and ``create_from_disk``.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

_HEADER = struct.Struct(">4sII")
# ctime and mtime in seconds and nanoseconds, dev, ino, mode, uid, gid, size; each in 32 bits, and cut off at these.
_STATS = struct.Struct(">10I")
_CTIME = struct.Struct(">II")
_INODE = struct.Struct(">I")
_OWNER = struct.Struct(">II")
_CTIME_AT, _INODE_AT, _MODE_AT, _OWNER_AT = 0, 20, 24, 28
_EXTENSION = struct.Struct(">4sI")
_FLAGS = struct.Struct(">H")

_STAGE, _EXTENDED, _LENGTH = 0x3000, 0x4000, 0x0FFF
_INTENT_TO_ADD = 0x2000  # of the extended flags
_WORD = 0xFFFFFFFF
_SECOND = 10**9

# The trailing digest, of a repository with SHA-1 or SHA-256, or zeroes (index.skipHash).
_HASHES = {20: hashlib.sha1, 32: hashlib.sha256}
# A small first letter means that a reader must know it. "sdir": some entries stand for directories (sparse index).
_KNOWN = (b"sdir",)


class Stats(NamedTuple):
    """What stat(2) says of a file in the original."""

    mode: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Copy(NamedTuple):
    """What stat(2) says of its copy."""

    inode: int
    ctime_ns: int
    uid: int
    gid: int


# Of a path from the top of the work tree: the original, and how to look at the copy, which is gone if that gives None.
Look = Callable[[bytes], "tuple[Stats, Callable[[], Copy | None]] | None"]


def refreshed(data: bytes, mtime_ns: int, look: Look) -> bytes | None:
    """An index that fits the copies; None if it has to stay as it is.

    Args:
        data: the index.
        mtime_ns: when it was written, as stat(2) says.
        look: finds the files.
    """
    read = _read(data)
    if read is None:
        return None
    body, digest, entries = read
    exchanged = 0
    for start, path in entries:
        exchanged += _exchange(body, start, path, mtime_ns, look)
    if not exchanged:
        return None
    # Without a digest (index.skipHash) there are zeroes.
    return bytes(body) + (_HASHES[len(digest)](body).digest() if any(digest) else digest)


def without_stats(data: bytes) -> bytes:
    """What an index says but for its stats: a work tree and its copy have the same; other bytes are returned as is."""
    read = _read(data)
    if read is None:
        return data
    body, _, entries = read
    for start, _ in entries:
        body[start : start + _MODE_AT] = bytes(_MODE_AT)
        body[start + _OWNER_AT : start + _STATS.size] = bytes(_STATS.size - _OWNER_AT)
    return bytes(body)


def _read(data: bytes) -> tuple[bytearray, bytes, list[tuple[int, bytes]]] | None:
    """The index without its digest, the digest, and where the entries are; None if it is unusual, or none."""
    for length, make in _HASHES.items():
        if len(data) < _HEADER.size + length:
            continue
        body, digest = bytearray(data[:-length]), data[-length:]
        if any(digest) and make(body).digest() != digest:
            continue
        try:
            return body, digest, _entries(body, length)
        except (struct.error, ValueError, IndexError):
            continue
    return None


def _entries(body: bytearray, length: int) -> list[tuple[int, bytes]]:
    """Where the stats of each file are. Raises ValueError and the like if it is unusual."""
    signature, version, count = _HEADER.unpack_from(body)
    if signature != b"DIRC" or version not in (2, 3, 4):
        raise ValueError("not an index, or of another version")
    found = []
    at, path = _HEADER.size, b""
    for _ in range(count):
        start = at
        at += _STATS.size + length
        (flags,) = _FLAGS.unpack_from(body, at)
        at += _FLAGS.size
        more = 0
        if flags & _EXTENDED:
            if version == 2:
                raise ValueError("extended flags in version 2")
            (more,) = _FLAGS.unpack_from(body, at)
            at += _FLAGS.size
        path, at = _path(body, version, start, at, path)
        if flags & _LENGTH != min(len(path), _LENGTH):
            raise ValueError("a path of another length")
        if not (flags & _STAGE or more & _INTENT_TO_ADD):
            found.append((start, path))
    _check_extensions(body, at)
    return found


def _path(body: bytearray, version: int, start: int, at: int, before: bytes) -> tuple[bytes, int]:
    """The path of an entry, and where the next entry begins."""
    if version == 4:
        cut, at = _number(body, at)
        if cut > len(before):
            raise ValueError("a path that is cut by more than there is")
        end = body.index(b"\0", at)
        return before[: len(before) - cut] + bytes(body[at:end]), end + 1
    end = body.index(b"\0", at)
    path = bytes(body[at:end])
    # Filled up to a multiple of eight bytes, with at least one.
    after = start + (end - start + 8) // 8 * 8
    if any(body[end:after]) or after > len(body):
        raise ValueError("an entry that is not filled up")
    return path, after


def _number(body: bytearray, at: int) -> tuple[int, int]:
    """A number of variable length (varint.c), and what follows it."""
    value = body[at] & 0x7F
    while body[at] & 0x80:
        at += 1
        value = (value + 1 << 7) + (body[at] & 0x7F)
        if value > _WORD:
            raise ValueError("too large a number")
    return value, at + 1


def _check_extensions(body: bytearray, at: int) -> None:
    while at < len(body):
        name, size = _EXTENSION.unpack_from(body, at)
        at += _EXTENSION.size + size
        if at > len(body):
            raise ValueError("an extension that is cut off")
        # "link" among them: the other part of the index is in another file.
        if not name[:1].isupper() and name not in _KNOWN:
            raise ValueError("an extension that a reader must know")


def _exchange(body: bytearray, start: int, path: bytes, mtime_ns: int, look: Look) -> bool:
    """Exchange the stats of one entry; whether that was done."""
    ctime_s, ctime_n, mtime_s, mtime_n, _, inode, mode, _, _, size = _STATS.unpack_from(body, start)
    entry_ns = mtime_s * _SECOND + mtime_n
    if entry_ns >= mtime_ns:
        return False  # racy
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        return False  # a submodule, or a directory of a sparse index
    found = look(path)
    if found is None:
        return False
    original, copied = found
    if (
        stat.S_IFMT(original.mode) != stat.S_IFMT(mode)
        or original.inode & _WORD != inode
        or original.size & _WORD != size
        or _cut(original.mtime_ns) != (mtime_s, mtime_n)
        or _cut(original.ctime_ns) != (ctime_s, ctime_n)
    ):
        return False
    copy = copied()
    if copy is None:
        return False
    _CTIME.pack_into(body, start + _CTIME_AT, *_cut(copy.ctime_ns))
    _INODE.pack_into(body, start + _INODE_AT, copy.inode & _WORD)
    _OWNER.pack_into(body, start + _OWNER_AT, copy.uid & _WORD, copy.gid & _WORD)
    return True


def _cut(time_ns: int) -> tuple[int, int]:
    seconds, rest = divmod(time_ns, _SECOND)
    return seconds & _WORD, rest
