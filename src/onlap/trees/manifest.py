"""Manifests: the files of a tree in the format of mtree(5), and how a tree deviates from its manifest.

A manifest describes a layer as it is on disk, with OverlayFS's markers. It is text that libarchive and go-mtree read
(``bsdtar -tf``, ``gomtree -f``), compressed with gzip::

    #mtree
    . type=dir mode=0755 uid=0 gid=0 time=1700000000.000000000
    ./a\\040b type=file mode=0644 uid=0 gid=0 time=1700000000.000000000 size=5 sha256digest=2cf24dba...
    ./c type=link mode=0777 uid=0 gid=0 time=1700000000.000000000 link=a\\040b

The names of one file share a number in the keyword ``inode``. Extended attributes are ``xattr.NAME`` with a value in
base64, as in go-mtree.

Sources: libarchive 3.7, mtree(5); github.com/vbatts/go-mtree, ``xattr_handlers_linux.go``.
"""

from __future__ import annotations

import base64
import contextlib
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
from onlap.overlayfs.options import octal_unescape
from onlap.trees import walk as walking
from onlap.trees.meta import read_xattrs
from onlap.trees.walk import OPEN_FILE, path_of, walk

_CHUNK = 1 << 20
_HEAD = b"#mtree\n"

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

# All bytes except those that vis(3) leaves as they are and that mean nothing in mtree(5).
_PLAIN = re.compile(rb"[^A-Za-z0-9._/,:@%+~^-]")

Spend = Callable[[int], object]
Unreadable = Callable[[str, OSError], object]
LinkNumbers = dict[tuple[int, int], int]


class Entry(NamedTuple):
    """One file of a manifest.

    Attributes:
        path: from the top of the tree; ``"."`` is the top itself.
        mode: type and permissions, as in ``st_mode``.
        uid: owner.
        gid: group.
        mtime_ns: nanoseconds since the epoch.
        size: bytes of a regular file, otherwise 0.
        digest: the SHA-256 of a regular file's content in hexadecimal, otherwise empty.
        rdev: the device number of a device, otherwise 0.
        target: the target of a symlink, otherwise empty.
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
    """One deviation of a tree from its manifest.

    Attributes:
        path: from the top of the tree.
        expected: the manifest's entry; None for a file that is not in it.
        what: what differs, of ``type``, ``mode``, ``owner``, ``mtime``, ``size``, ``content``, ``device``, ``target``,
            ``links`` and ``xattrs``; empty for a missing or additional file.
        found: whether the file exists.
    """

    path: str
    expected: Entry | None
    what: frozenset[str]
    found: bool


def entries(top: int, spend: Spend = lambda _bytes: None, unreadable: Unreadable | None = None) -> Iterator[Entry]:
    """The files of a tree, in the order of its manifest: a directory before its contents, sorted by the names' bytes.

    Args:
        top: a descriptor of its top directory; left open.
        spend: called with the size of every chunk read, in bytes, and with 0 for every file.
        unreadable: called for a file whose content or xattrs cannot be read, whose digest is then empty; without it,
            that is an error.

    Raises:
        OSError: something cannot be read.
    """
    links: LinkNumbers = {}
    for found in places(top):
        spend(0)
        digest, xattrs = "", dict[str, bytes]()
        try:
            xattrs = read_xattrs(path_of(found.dir_fd, found.name), markers=True)
            if stat.S_ISREG(found.status.st_mode):
                digest = _digest(found.name, found.dir_fd, spend)
        except OSError as error:
            if unreadable is None:
                raise
            unreadable(found.path, error)
        yield entry_of(found, links, digest, xattrs)


def places(top: int) -> Iterator[walking.Entry]:
    """The files of a tree in the order of its manifest, beginning with the top itself; see :func:`walk`."""
    return itertools.chain([walking.Entry(".", ".", top, os.fstat(top))], walk(top))


def entry_of(found: walking.Entry, links: LinkNumbers, digest: str, xattrs: Mapping[str, bytes]) -> Entry:
    """The entry of a file that was found.

    Args:
        found: the file.
        links: numbers of files with several names, by device and inode; one dict per tree.
        digest: of its content; empty unless it is a regular file.
        xattrs: all of its extended attributes.

    Raises:
        OSError: the target of a symlink cannot be read.
    """
    status = found.status
    mode = status.st_mode
    size, link = status.st_size if stat.S_ISREG(mode) else 0, 0
    if status.st_nlink > 1 and not stat.S_ISDIR(mode):
        link = links.setdefault((status.st_dev, status.st_ino), len(links) + 1)
    return Entry(
        found.path,
        mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        size,
        digest,
        status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        os.readlink(found.name, dir_fd=found.dir_fd) if stat.S_ISLNK(mode) else "",
        link,
        xattrs,
    )


def _digest(name: str, dir_fd: int, spend: Spend) -> str:
    with opened_unchanged(name, dir_fd) as fd:
        return digest_of(fd, spend)


def digest_of(fd: int, spend: Spend = lambda _bytes: None) -> str:
    """The SHA-256 of the rest of an open file in hexadecimal; raises OSError."""
    found = hashlib.sha256()
    while chunk := os.read(fd, _CHUNK):
        found.update(chunk)
        spend(len(chunk))
    return found.hexdigest()


@contextlib.contextmanager
def opened_unchanged(name: str, dir_fd: int) -> Iterator[int]:
    """Open a file as :func:`open_unchanged` does, for the duration of a block; raises OSError."""
    fd = open_unchanged(name, dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def open_unchanged(name: str, dir_fd: int) -> int:
    """Open a file for reading without changing its access time, if the kernel permits that; raises OSError."""
    flags = OPEN_FILE | os.O_NONBLOCK  # it may be a FIFO by now
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError:  # the file is another user's (open(2))
        return os.open(name, flags, dir_fd=dir_fd)


# Writing


def write(listed: Iterable[Entry], out: BinaryIO) -> str:
    """Write a manifest; return its digest, ``"sha256:..."`` of the uncompressed text."""
    digest = hashlib.sha256()
    # Without name and time, so that the same tree gives the same bytes.
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
    """The entries of a manifest with a known digest; raises as :func:`iterate`."""
    return list(iterate(file, digest))


def iterate(file: BinaryIO, digest: str) -> Iterator[Entry]:
    """The entries of a manifest one by one. Whether its digest is right is known only at the end.

    Raises:
        DataLoss: it is damaged.
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as packed:
            while line := packed.readline():
                found.update(line)
                if line[:1] != b"#":
                    yield _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise _damaged(digest) from error
    if f"sha256:{found.hexdigest()}" != digest:
        raise _damaged(digest)


def _damaged(digest: str) -> errors.DataLoss:
    return errors.DataLoss(f"the manifest {shown(digest)} is damaged", key=digest)


def _parse(line: bytes) -> Entry:
    name, *words = line.rstrip(b"\n").split(b" ")
    fields = dict(word.split(b"=", 1) for word in words)
    seconds, _, rest = fields[b"time"].partition(b".")
    rdev = 0
    if b"device" in fields:
        _, major, minor = fields[b"device"].split(b",")
        rdev = os.makedev(int(major), int(minor))
    return Entry(
        "." if name == b"." else os.fsdecode(octal_unescape(name.removeprefix(b"./"))),
        _FORMATS[fields[b"type"].decode()] | int(fields[b"mode"], 8),
        int(fields[b"uid"]),
        int(fields[b"gid"]),
        int(seconds) * 10**9 + int(rest),
        int(fields.get(b"size", 0)),
        fields.get(b"sha256digest", b"").decode(),
        rdev,
        os.fsdecode(octal_unescape(fields.get(b"link", b""))),
        int(fields.get(b"inode", 0)),
        {
            os.fsdecode(octal_unescape(key.removeprefix(b"xattr."))): base64.b64decode(value)
            for key, value in fields.items()
            if key.startswith(b"xattr.")
        },
    )


# Comparing


def deviations(
    expected: Iterable[Entry], top: int, spend: Spend = lambda _bytes: None, unreadable: Unreadable | None = None
) -> Iterator[Deviation]:
    """How a tree deviates from its manifest, in the order of the manifest.

    Args:
        expected: the manifest.
        top: a descriptor of the tree's top directory; left open.
        spend, unreadable: see :func:`entries`.

    Raises:
        OSError: something cannot be read.
    """
    wanted = iter(expected)
    links = Links()
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
            what = differences(one, other, links)
            if what:
                yield Deviation(one.path, one, what, found=True)
            one, other = next(wanted, None), next(found, None)


def _order(path: str) -> list[bytes]:
    return [] if path == "." else os.fsencode(path).split(b"/")


class Links:
    """Maps the numbers of files with several names on one side to those on the other.

    A file that has one name in the tree may have others outside, and lose them: the kernel links the whiteouts of a
    layer to one in its workdir. So that is the same as a file with a single name.
    """

    def __init__(self) -> None:
        self._forth: dict[int, int] = {}
        self._back: dict[int, int] = {}
        self._single = 0

    def differ(self, one: int, other: int) -> bool:
        """Whether two files do not have the same other names."""
        if not one and not other:
            return False
        self._single -= 1
        one, other = one or self._single, other or self._single
        return self._forth.setdefault(one, other) != other or self._back.setdefault(other, one) != one


def differences(one: Entry, other: Entry, links: Links) -> frozenset[str]:
    """What differs between two entries of one path; see :class:`Deviation`."""
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
