"""Reading bbolt's database files (format version 2), in which containerd keeps its records.

A file is read while a daemon writes to it, after power cuts, and when it is damaged. One transaction is read into
memory as a whole; nothing of it is trusted but its meta page, which has a checksum.

**Why it is copied.** bbolt's lock, flock(2) of the whole file, is exclusive for as long as the daemon runs: no reader
outside can pin a transaction as those in the daemon do. But bbolt never writes to a page in use:

- Transaction T frees the pages that it replaces. They belong to the state T-1, and are written to again from T+1 on:
  ``DB.freePages`` runs when a write transaction begins, and T+1 begins after T has written its meta page.
- So the pages of a state S are as they were until S+2 writes its first page, which is after the meta page of S+1 and
  before its own. That S+2 has begun cannot be seen; that S+1 has ended can.

Hence what was read of S is whole if both meta pages are the same afterwards: S+1 has not ended then. Transaction ids
only grow, so that no meta page becomes again what it was. One that is seen half-written has a wrong checksum: S is the
other one then, and the same holds. To read all at once makes the window short, some ten milliseconds for 100 MB; pages
read as the caller comes to them would make it as long as the caller's work, and a busy daemon leaves no such time.
``mmap`` would save the copy, but ends the process (SIGBUS) if the file is cut off meanwhile.

Sources: bbolt v1.3, ``db.go``, ``page.go``, ``bucket.go``, ``node.go``, ``freelist.go``, ``tx.go``, ``tx_check.go``;
v1.4 has the same format in ``internal/common``.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown

# Bytes of a file that are read into memory unless the caller says otherwise.
LIMIT = 1 << 30

# bbolt writes its structures as they are in memory, so in the byte order of the machine; none has padding.
_META = struct.Struct("=4I6Q")  # magic version page-size flags root sequence freelist pages txid checksum
_PAGE = struct.Struct("=QHHI")  # number kind count overflow
_BRANCH = struct.Struct("=IIQ")  # position key-size page
_LEAF = struct.Struct("=4I")  # flags position key-size value-size
_BUCKET = struct.Struct("=QQ")  # root sequence
_HEAD = _PAGE.size
_ELEMENT = _LEAF.size
assert _HEAD == _ELEMENT == _BRANCH.size == _BUCKET.size == 16

_MAGIC = 0xED0CDAED
_VERSION = 2
_KIND_BRANCH = 0x01
_KIND_LEAF = 0x02
_KINDS = {0x04: "a meta page", 0x10: "a list of free pages"}
# The sizes at which bbolt looks for the second meta page if the first is damaged (DB.getPageSizeFromSecondMeta).
_PAGE_SIZES = tuple(1024 << shift for shift in range(15))

# Levels of branch pages, and of buckets in buckets. A branch page has two keys at least (node.minKeys), so that no file
# has room for 64 levels; containerd nests eight buckets.
_LEVELS = 64
_NESTED = 64

# Who refers to the page of the root bucket: the position of no element.
_BY_META = 1

# A writer that has just committed leaves us the most time, so that we begin again at once; after some attempts, it may
# be a burst of commits that has an end.
_ATTEMPTS = 30
_EAGER = 10
_PAUSE = 0.1  # s


class _Meta(NamedTuple):
    """A valid meta page; ``pages`` is the number of the first page that the transaction does not have."""

    page_size: int
    root: int
    sequence: int
    pages: int
    txid: int


class _Page(NamedTuple):
    """A page with its overflow pages, or the page in the value of an inline bucket; positions are those in the file."""

    number: int
    kind: int
    start: int
    end: int
    elements: int


class _Child(NamedTuple):
    """What a branch page says of a page: the keys in it are from ``low`` up to ``high``, which is not among them.

    ``claimant`` is the position in the file of what refers to it.
    """

    low: bytes
    high: bytes | None
    number: int
    claimant: int


# A key, its flags, and from where to where its value is in the file.
_Element = tuple[bytes, int, int, int]


class _Image:
    """One transaction in memory, and which of its pages are used by what."""

    __slots__ = ("_claims", "_data", "meta", "path")

    def __init__(self, path: str, meta: _Meta, data: bytes) -> None:
        self.path = path
        self.meta = meta
        self._data: bytes | None = data
        self._claims = array("Q", bytes(8 * (len(data) // meta.page_size)))

    def close(self) -> None:
        self._data = None
        self._claims = array("Q")

    def data(self) -> bytes:
        """The file from its beginning; raises FailedPrecondition after the ``with`` block."""
        if self._data is None:
            raise errors.FailedPrecondition(f"{shown(self.path)} is no longer open", key=self.path)
        return self._data

    def damaged(self, page: int, what: str) -> errors.DataLoss:
        return errors.DataLoss(f"{shown(self.path)} is damaged: page {page}: {what}", key=self.path)

    def page(self, child: _Child) -> _Page:
        """The branch or leaf page that ``child`` refers to.

        Raises:
            DataLoss: it is no such page, or something else refers to it as well.
        """
        data, size, number = self.data(), self.meta.page_size, child.number
        if not 2 <= number < self.meta.pages:
            raise self.damaged(
                child.claimant // size, f"it refers to page {number}, but pages are 2 to {self.meta.pages - 1}"
            )
        if number >= len(self._claims):
            raise self.damaged(number, f"the file ends before it, at byte {len(data)}")
        start = number * size
        itself, kind, count, overflow = _PAGE.unpack_from(data, start)
        if itself != number:
            raise self.damaged(number, f"it has the number {itself}")
        if kind not in (_KIND_BRANCH, _KIND_LEAF):
            what = _KINDS.get(kind) or f"of the unknown kind {kind:#x}"
            raise self.damaged(number, f"it is {what}, and not of a bucket")
        after = number + overflow + 1
        if after > self.meta.pages:
            raise self.damaged(number, f"its {overflow} overflow pages are more than the database has after it")
        if after > len(self._claims):
            raise self.damaged(number, f"the file ends in its overflow pages, at byte {len(data)}")
        page = _Page(number, kind, start, after * size, count)
        self._check_count(page)
        if kind == _KIND_BRANCH and not count:
            raise self.damaged(number, "it is a branch page without children")
        self._claim(number, after, child.claimant)
        return page

    def _claim(self, number: int, after: int, claimant: int) -> None:
        """Note what refers to pages, once: since each has one claimant, all that is reachable is a tree.

        So no walk comes to a page a second time, and none is longer than the file, whatever it has been made of.
        """
        claims = self._claims
        for one in range(number, after):
            if claims[one] != claimant:
                if claims[one]:
                    other = claims[one] // self.meta.page_size
                    raise self.damaged(one, f"it is used twice, by pages {other} and {claimant // self.meta.page_size}")
                claims[one] = claimant

    def inline(self, start: int, end: int) -> _Page:
        """The page in the value of a bucket at ``start``; raises DataLoss."""
        number = start // self.meta.page_size
        if end - start < _HEAD:
            raise self.damaged(number, f"an inline bucket has {end - start} bytes, too few for its page")
        # bbolt does not write the number (Bucket.write), nor does it read it.
        _, kind, count, _ = _PAGE.unpack_from(self.data(), start)
        if kind != _KIND_LEAF:
            raise self.damaged(number, f"an inline bucket is of the kind {kind:#x}, and not a leaf")
        page = _Page(number, kind, start, end, count)
        self._check_count(page)
        return page

    def _check_count(self, page: _Page) -> None:
        if page.start + _HEAD + page.elements * _ELEMENT > page.end:
            room = page.end - page.start
            raise self.damaged(page.number, f"its {page.elements} elements do not fit into {room} bytes")

    # Both check that the data of elements follow one another, as node.write leaves them. If they could overlap, a small
    # file might have any number of large values. Keys have no limit of their own: CreateBucket does not check it.

    def branch(self, page: _Page, low: bytes, high: bytes | None) -> Iterator[_Child]:
        """The children of a branch page whose keys are from ``low`` up to ``high``; raises DataLoss."""
        data = self.data()
        at = page.start + _HEAD
        floor = at + page.elements * _ELEMENT
        key, previous, claimant = b"", 0, 0
        for position, size, number in _BRANCH.iter_unpack(memoryview(data)[at:floor]):
            start = at + position
            end = start + size
            if start < floor or end > page.end or not size:
                raise self._misplaced(page, at)
            last, key = key, data[start:end]
            if key <= last or key < low or (high is not None and key >= high):
                raise self._misordered(page, at)
            if claimant:
                yield _Child(last, key, previous, claimant)
            previous, claimant, floor = number, at, end
            at += _ELEMENT
        yield _Child(key, high, previous, claimant)

    def leaf(self, page: _Page, low: bytes, high: bytes | None) -> Iterator[_Element]:
        """The elements of a leaf page whose keys are from ``low`` up to ``high``; raises DataLoss."""
        data = self.data()
        at = page.start + _HEAD
        floor = at + page.elements * _ELEMENT
        limit = page.end
        key = b""
        for flags, position, key_size, value_size in _LEAF.iter_unpack(memoryview(data)[at:floor]):
            start = at + position
            middle = start + key_size
            end = middle + value_size
            if start < floor or end > limit or not key_size:
                raise self._misplaced(page, at)
            last, key = key, data[start:middle]
            if key <= last or key < low or (high is not None and key >= high):
                raise self._misordered(page, at)
            if flags > 1:
                raise self.damaged(page.number, f"its element {_index(page, at)} has the unknown flags {flags:#x}")
            yield key, flags, middle, end
            floor = end
            at += _ELEMENT

    def _misplaced(self, page: _Page, at: int) -> errors.DataLoss:
        return self.damaged(page.number, f"its element {_index(page, at)} is not within it, or lies over another")

    def _misordered(self, page: _Page, at: int) -> errors.DataLoss:
        return self.damaged(page.number, f"the key of its element {_index(page, at)} is out of order")


def _index(page: _Page, at: int) -> int:
    return (at - page.start - _HEAD) // _ELEMENT


class Bucket:
    """A bucket: keys in bytewise order, each with a value or with another bucket.

    All methods raise :class:`errors.DataLoss` when they come to something damaged; an iterator only when it is reached.
    After the ``with`` block of :func:`opened` they raise :class:`errors.FailedPrecondition`.

    Attributes:
        names: the names of the buckets that it is in, from the root on, and its own; empty for the root.
        sequence: the number that NextSequence returned last; 0 if it was not called.
    """

    __slots__ = ("_image", "_top", "names", "sequence")

    def __init__(self, image: _Image, names: tuple[bytes, ...], top: _Page | _Child, sequence: int) -> None:
        self.names = names
        self.sequence = sequence
        self._image = image
        self._top = top

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'/'.join(map(shown, self.names))}>"

    def items(self) -> Iterator[tuple[bytes, bytes | Bucket]]:
        """All keys in order, each with its value or bucket; one page at a time is looked at."""
        data = self._image.data()
        for key, flags, start, end in self._elements():
            yield key, self._bucket(key, start, end) if flags else data[start:end]

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if there is none, or if it is a bucket.

        The pages on the way to it are checked as a whole, so that None is never said for damage on them: for most keys
        of a large bucket, :meth:`items` is much faster.
        """
        found = self._find(key)
        if found is None or found[1]:
            return None
        return self._image.data()[found[2] : found[3]]

    def bucket(self, *names: bytes) -> Bucket | None:
        """The bucket of that name, and in it that of the next one; None if there is none, or if it is a value."""
        bucket = self
        for name in names:
            found = bucket._find(name)
            if found is None or not found[1]:
                return None
            bucket = bucket._bucket(name, found[2], found[3])
        return bucket

    def _bucket(self, name: bytes, start: int, end: int) -> Bucket:
        image, names = self._image, (*self.names, name)
        number = start // image.meta.page_size
        if len(names) > _NESTED:
            raise image.damaged(number, f"it has a bucket that is more than {_NESTED} buckets deep")
        if end - start < _BUCKET.size:
            # What is damaged may have a name of a gigabyte.
            named = shown(name[:100])
            raise image.damaged(number, f"the bucket {named} has {end - start} bytes, too few for its header")
        root, sequence = _BUCKET.unpack_from(image.data(), start)
        top = _Child(b"", None, root, start) if root else image.inline(start + _BUCKET.size, end)
        return Bucket(image, names, top, sequence)

    def _elements(self) -> Iterator[_Element]:
        image = self._image
        if isinstance(self._top, _Page):
            yield from image.leaf(self._top, b"", None)
            return
        levels = [iter((self._top,))]
        while levels:
            child = next(levels[-1], None)
            if child is None:
                levels.pop()
                continue
            page = image.page(child)
            if page.kind == _KIND_LEAF:
                yield from image.leaf(page, child.low, child.high)
            else:
                _check_level(image, page, len(levels))
                levels.append(image.branch(page, child.low, child.high))

    def _find(self, key: bytes) -> _Element | None:
        image, top = self._image, self._top
        if isinstance(top, _Page):
            return _among(key, image.leaf(top, b"", None))
        level = 1
        while (page := image.page(top)).kind == _KIND_BRANCH:
            _check_level(image, page, level)
            children = image.branch(page, top.low, top.high)
            top = next(children)
            for child in children:
                if child.low <= key:
                    top = child
            level += 1
        return _among(key, image.leaf(page, top.low, top.high))


def _check_level(image: _Image, page: _Page, level: int) -> None:
    if level > _LEVELS:
        raise image.damaged(page.number, f"it is more than {_LEVELS} branch pages deep")


def _among(key: bytes, elements: Iterator[_Element]) -> _Element | None:
    found = None
    for element in elements:  # to the end: all of them are checked
        if element[0] == key:
            found = element
    return found


class Database(Bucket):
    """One transaction of a database, which is also its root bucket; bbolt has no values in it, only buckets.

    Attributes:
        path: the file.
        txid: the number of the transaction: the newest that is whole.
        page_size: bytes.
        invalid_meta: which of the two meta pages is not valid, 0 or 1, as after a power cut in a commit; else None.
    """

    __slots__ = ("invalid_meta", "page_size", "path", "txid")

    def __init__(self, image: _Image, invalid_meta: int | None) -> None:
        meta = image.meta
        super().__init__(image, (), _Child(b"", None, meta.root, _BY_META), meta.sequence)
        self.path = image.path
        self.txid = meta.txid
        self.page_size = meta.page_size
        self.invalid_meta = invalid_meta


@contextlib.contextmanager
def opened(path: str, *, limit: int = LIMIT) -> Iterator[Database]:
    """The newest transaction of a database, as it is now; a daemon may have the file open, and write to it.

    The file is closed again before the block begins; its end frees the memory.

    Args:
        path: the file. It may be a symlink: the daemon follows it, too.
        limit: bytes of memory that the transaction may need, which is the size of the file at most.

    Raises:
        DataLoss: it is not a database, or both of its meta pages are damaged.
        ResourceExhausted: it is larger than ``limit``.
        Unavailable: it was written to during every attempt to read it.
    """
    image, invalid = _load(path, limit)
    try:
        yield Database(image, invalid)
    finally:
        image.close()


def _load(path: str, limit: int) -> tuple[_Image, int | None]:
    with errors.translated("open the database", key=path):
        # Before it is opened: to open some devices does something.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _no_file(path)
        # O_NONBLOCK: it may be a FIFO by now. No O_NOFOLLOW: the daemon follows a symlink, too.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with errors.translated(f"read {shown(path)}", key=path):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _no_file(path)
            return _read_transaction(path, fd, limit)
    finally:
        os.close(fd)


def _no_file(path: str) -> errors.DataLoss:
    return errors.DataLoss(f"{shown(path)} is not a bbolt database: it is not a file", key=path)


def _read_transaction(path: str, fd: int, limit: int) -> tuple[_Image, int | None]:
    for attempt in range(_ATTEMPTS):
        if attempt >= _EAGER:
            time.sleep(_PAUSE)
        raw = _raw_metas(fd)
        meta, invalid = _newest(raw)
        data = b""
        if isinstance(meta, _Meta):
            # After the meta pages: the writer makes the file larger before it writes the one that needs it.
            size = min(meta.pages * meta.page_size, os.fstat(fd).st_size)
            if size > limit:
                raise errors.ResourceExhausted(
                    f"{shown(path)} has {size} bytes, more than the {limit} that are read into memory", key=path
                )
            data = _read(path, fd, size)
        if _raw_metas(fd) != raw:
            continue
        if isinstance(meta, str):
            raise errors.DataLoss(f"{shown(path)} {meta}", key=path)
        return _Image(path, meta, data), invalid
    raise errors.Unavailable(
        f"{shown(path)} was written to each of the {_ATTEMPTS} times that it was read", key=path, hint="try again"
    )


def _read(path: str, fd: int, size: int) -> bytes:
    """The first ``size`` bytes, or all that there are."""
    try:
        data = os.pread(fd, size, 0)
        # Only some filesystems return less than there is.
        while len(data) < size and (more := os.pread(fd, size - len(data), len(data))):
            data += more
    except MemoryError as error:
        raise errors.ResourceExhausted(f"there is no memory for the {size} bytes of {shown(path)}", key=path) from error
    return data


def _raw_metas(fd: int) -> tuple[bytes, bytes]:
    """The beginnings of both meta pages; the second is empty if it cannot be found."""
    wanted = _HEAD + _META.size
    first = os.pread(fd, wanted, 0)
    meta = _parsed(first)
    if isinstance(meta, _Meta):
        return first, os.pread(fd, wanted, meta.page_size)
    for size in _PAGE_SIZES:
        second = os.pread(fd, wanted, size)
        meta = _parsed(second)
        if isinstance(meta, _Meta) and meta.page_size == size:
            return first, second
    return first, b""


def _newest(raw: tuple[bytes, bytes]) -> tuple[_Meta | str, int | None]:
    """The newer of the valid meta pages, or what is wrong with the file; and which page is not valid."""
    first, second = map(_parsed, raw)
    if isinstance(first, str):
        return (second, 0) if isinstance(second, _Meta) else (first, None)
    if isinstance(second, str) or second.page_size != first.page_size:
        return first, 1
    return (second if second.txid > first.txid else first), None


def _parsed(raw: bytes) -> _Meta | str:
    """A meta page with its header, as bbolt validates it, or what is wrong with it, after the name of the file.

    Its header is not looked at, nor does bbolt: a newer transaction must not be passed over for it.
    """
    if not raw:
        return "is empty: it is not a bbolt database"
    if len(raw) < _HEAD + _META.size:
        return "is too short for a bbolt database"
    magic, version, page_size, _, root, sequence, _, pages, txid, checksum = _META.unpack_from(raw, _HEAD)
    if magic != _MAGIC:
        if magic == int.from_bytes(_MAGIC.to_bytes(4, "big"), "little"):
            return "is a bbolt database of a machine with the other byte order"
        return "is not a bbolt database, or its beginning was overwritten"
    if version != _VERSION:
        return f"is a bbolt database of version {version}; only version {_VERSION} is known"
    if checksum != _fnv64a(raw[_HEAD : _HEAD + _META.size - 8]):
        return "is damaged: neither of its meta pages is valid"
    if page_size not in _PAGE_SIZES:
        return f"is damaged: it has pages of {page_size} bytes"
    return _Meta(page_size, root, sequence, pages, txid)


def _fnv64a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
