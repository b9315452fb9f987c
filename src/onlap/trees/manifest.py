"""What a tree holds, file by file, as mtree(5) writes it; and where a tree is not what its manifest says.

A manifest is of a layer as it lies on the disk, with OverlayFS's markers. It is the text that libarchive and go-mtree
read (``bsdtar -tf``, ``gomtree -f``), compressed with gzip::

    #mtree
    . type=dir mode=0755 uid=0 gid=0 time=1700000000.000000000
    ./a\\040b type=file mode=0644 uid=0 gid=0 time=1700000000.000000000 size=5 sha256digest=2cf24dba...
    ./c type=link mode=0777 uid=0 gid=0 time=1700000000.000000000 link=a\\040b

Files with several names have the keyword ``inode`` with a number that they share. Extended attributes are
``xattr.NAME`` with a value in base64, as go-mtree has them.

Sources: libarchive 3.7, mtree(5); github.com/vbatts/go-mtree, ``xattr_handlers_linux.go``.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import gzip
import hashlib
import itertools
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.trees import walk as walking
from onlap.trees.meta import list_xattrs
from onlap.trees.walk import OPEN_FILE, opened, path_of, walk

_CHUNK = 1 << 20
_HEAD = b"#mtree\n"
# Bytes of one line: names of 255 bytes, 4 characters each, as deep as a tree may be; xattrs of 64 KiB each, several.
_MAX_LINE = 16 << 20

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_FORMATS = {name: mode for mode, name in _TYPES.items()}

# What vis(3) leaves as it is, of what mtree(5) gives no meaning to.
_PLAIN = re.compile(rb"[^A-Za-z0-9._/,:@%+~^-]")
_ESCAPED = re.compile(rb"\\([0-3][0-7]{2})")

Spend = Callable[[int], object]
Unreadable = Callable[[str, OSError], object]


class Entry(NamedTuple):
    """One file of a manifest.

    Attributes:
        path: from the top of the tree; ``"."`` is the top itself.
        mode: type and permissions, as in ``st_mode``.
        uid: owner.
        gid: group.
        mtime_ns: nanoseconds since the epoch.
        size: bytes of a regular file, else 0.
        digest: of a regular file's content, SHA-256 in hexadecimal; else empty.
        rdev: the device number of a device, else 0.
        target: what a symlink points to, else empty.
        link: the same number for all names of one file, from 1 on; 0 for a file with one name.
        xattrs: all extended attributes.
    """

    path: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    digest: str = ""
    rdev: int = 0
    target: str = ""
    link: int = 0
    xattrs: Mapping[str, bytes] = {}


class Deviation(NamedTuple):
    """Where a tree is not what its manifest says.

    Attributes:
        path: from the top of the tree.
        expected: what the manifest says; None for a file that it does not know.
        what: what differs, of ``type``, ``mode``, ``owner``, ``mtime``, ``size``, ``content``, ``device``, ``target``,
            ``links`` and ``xattrs``; empty for a file that is missing or not known.
        found: whether there is such a file.
    """

    path: str
    expected: Entry | None
    what: frozenset[str]
    found: bool


def entries(top: int, spend: Spend = lambda _bytes: None, unreadable: Unreadable | None = None) -> Iterator[Entry]:
    """What a tree holds, in the order of its manifest: a directory before what is in it, names sorted by their bytes.

    Args:
        top: a descriptor of its top directory; left open.
        spend: told of every chunk that was read, in bytes, and of one byte per file.
        unreadable: told of a file whose content cannot be read, whose digest is empty then; else that is an error.

    Raises:
        OSError: something cannot be read.
    """
    links: dict[tuple[int, int], int] = {}
    for path, status, dir_fd, name in itertools.chain([(".", os.fstat(top), top, ".")], map(_place, walk(top))):
        spend(1)
        digest = ""
        if stat.S_ISREG(status.st_mode):
            try:
                digest = _digest(name, dir_fd, spend)
            except OSError as error:
                if unreadable is None:
                    raise
                unreadable(path, error)
        yield _entry(path, status, dir_fd, name, links, digest)


def _place(found: walking.Entry) -> tuple[str, os.stat_result, int, str]:
    return found.path, found.status, found.dir_fd, found.name


def _entry(
    path: str, status: os.stat_result, dir_fd: int, name: str, links: dict[tuple[int, int], int], digest: str
) -> Entry:
    mode = status.st_mode
    size, link = status.st_size if stat.S_ISREG(mode) else 0, 0
    if status.st_nlink > 1 and not stat.S_ISDIR(mode):
        link = links.setdefault((status.st_dev, status.st_ino), len(links) + 1)
    return Entry(
        path,
        mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        size,
        digest,
        status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else "",
        link,
        _xattrs(path_of(dir_fd, name)),
    )


def _digest(name: str, dir_fd: int, spend: Spend) -> str:
    # O_NONBLOCK: it may be a FIFO by now. To look at a file shall not change it.
    with opened_unchanged(name, dir_fd) as fd:
        found = hashlib.sha256()
        while chunk := os.read(fd, _CHUNK):
            found.update(chunk)
            spend(len(chunk))
    return found.hexdigest()


@contextlib.contextmanager
def opened_unchanged(name: str, dir_fd: int) -> Iterator[int]:
    """A file, open for reading, whose access time stays where the kernel lets us say so; raises OSError."""
    flags = OPEN_FILE | os.O_NONBLOCK
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(opened(name, flags | os.O_NOATIME, dir_fd=dir_fd))
        except PermissionError:  # the file is another user's (open(2))
            fd = stack.enter_context(opened(name, flags, dir_fd=dir_fd))
        yield fd


def _xattrs(path: str) -> dict[str, bytes]:
    found = {}
    for name in list_xattrs(path):
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):  # listed without being readable
                raise
    return found


# Writing


def write(listed: Iterable[Entry], out: BinaryIO) -> str:
    """Write a manifest; returns its digest, ``"sha256:..."`` of the text without its compression."""
    digest = hashlib.sha256()
    # No name and no time, so that the same tree has the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=1) as packed:
        for line in itertools.chain([_HEAD], map(_line, listed)):
            digest.update(line)
            packed.write(line)
    return f"sha256:{digest.hexdigest()}"


def _line(entry: Entry) -> bytes:
    seconds, rest = divmod(entry.mtime_ns, 10**9)
    words = [
        b"." if entry.path == "." else b"./" + _escaped(os.fsencode(entry.path)),
        f"type={_TYPES[stat.S_IFMT(entry.mode)]} mode={stat.S_IMODE(entry.mode):04o} uid={entry.uid} gid={entry.gid}"
        f" time={seconds}.{rest:09}".encode(),
    ]
    if entry.digest:
        words.append(f"size={entry.size} sha256digest={entry.digest}".encode())
    if entry.target:
        words.append(b"link=" + _escaped(os.fsencode(entry.target)))
    if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
        words.append(f"device=native,{os.major(entry.rdev)},{os.minor(entry.rdev)}".encode())
    if entry.link:
        words.append(f"inode={entry.link}".encode())
    for name, value in sorted(entry.xattrs.items()):
        words.append(b"xattr." + _escaped(os.fsencode(name)) + b"=" + base64.b64encode(value))
    return b" ".join(words) + b"\n"


def _escaped(name: bytes) -> bytes:
    return _PLAIN.sub(lambda found: b"\\%03o" % found[0][0], name)


# Reading


def read(file: BinaryIO, digest: str) -> list[Entry]:
    """The entries of a manifest whose digest is known.

    Raises:
        DataLoss: it is damaged.
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    listed = []
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as packed:
            while line := packed.readline(_MAX_LINE):
                found.update(line)
                if line[:1] != b"#":
                    listed.append(_parse(line))
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError, IndexError) as error:
        raise _damaged(digest) from error
    if f"sha256:{found.hexdigest()}" != digest:
        raise _damaged(digest)
    return listed


def _damaged(digest: str) -> errors.DataLoss:
    return errors.DataLoss(f"the manifest {shown(digest)} is damaged", key=digest)


def _parse(line: bytes) -> Entry:
    name, *words = line.rstrip(b"\n").split(b" ")
    told = dict(word.split(b"=", 1) for word in words)
    seconds, _, rest = told[b"time"].partition(b".")
    rdev = 0
    if b"device" in told:
        _, major, minor = told[b"device"].split(b",")
        rdev = os.makedev(int(major), int(minor))
    return Entry(
        "." if name == b"." else os.fsdecode(_unescaped(name.removeprefix(b"./"))),
        _FORMATS[told[b"type"].decode()] | int(told[b"mode"], 8),
        int(told[b"uid"]),
        int(told[b"gid"]),
        int(seconds) * 10**9 + int(rest),
        int(told.get(b"size", 0)),
        told.get(b"sha256digest", b"").decode(),
        rdev,
        os.fsdecode(_unescaped(told.get(b"link", b""))),
        int(told.get(b"inode", 0)),
        {
            os.fsdecode(_unescaped(key.removeprefix(b"xattr."))): base64.b64decode(value)
            for key, value in told.items()
            if key.startswith(b"xattr.")
        },
    )


def _unescaped(name: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), name)


# Comparing


def deviations(
    expected: Iterable[Entry], top: int, spend: Spend = lambda _bytes: None, unreadable: Unreadable | None = None
) -> Iterator[Deviation]:
    """Where a tree is not what its manifest says, in its order.

    Args:
        expected: the manifest.
        top: a descriptor of the tree's top directory; left open.
        spend: see :func:`entries`.
        unreadable: likewise.

    Raises:
        OSError: something cannot be read.
    """
    wanted = iter(expected)
    links = _Links()
    found = entries(top, spend, unreadable)
    one, other = next(wanted, None), next(found, None)
    while one is not None or other is not None:
        if other is None or (one is not None and _order(one.path) < _order(other.path)):
            assert one is not None
            yield Deviation(one.path, one, frozenset(), found=False)
            one = next(wanted, None)
        elif one is None or _order(other.path) < _order(one.path):
            yield Deviation(other.path, None, frozenset(), found=True)
            other = next(found, None)
        else:
            what = _what(one, other, links)
            if what:
                yield Deviation(one.path, one, what, found=True)
            one, other = next(wanted, None), next(found, None)


def _order(path: str) -> list[bytes]:
    return [] if path == "." else os.fsencode(path).split(b"/")


class _Links:
    """Which number of a file with several names stands for which on the other side."""

    def __init__(self) -> None:
        self._forth: dict[int, int] = {}
        self._back: dict[int, int] = {}

    def differ(self, one: int, other: int) -> bool:
        if not one or not other:
            return one != other
        return self._forth.setdefault(one, other) != other or self._back.setdefault(other, one) != one


def _what(one: Entry, other: Entry, links: _Links) -> frozenset[str]:
    if stat.S_IFMT(one.mode) != stat.S_IFMT(other.mode):
        return frozenset({"type"})
    differs = {
        "mode": one.mode != other.mode,
        "owner": (one.uid, one.gid) != (other.uid, other.gid),
        "mtime": one.mtime_ns != other.mtime_ns,
        "size": one.size != other.size,
        "content": one.digest != other.digest and one.size == other.size,
        "device": one.rdev != other.rdev,
        "target": one.target != other.target,
        "links": links.differ(one.link, other.link),
        "xattrs": dict(one.xattrs) != dict(other.xattrs),
    }
    return frozenset(word for word, is_so in differs.items() if is_so)
