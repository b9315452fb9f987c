"""Reading tar archives as a stream: ustar, pax, GNU, star and v7, sparse files in all their forms.

Written for speed: a header costs one unpack and one checksum, data is handed out as views of the chunks that it came
in, and nothing is kept of an entry once the next one is asked for.
"""

from __future__ import annotations

import binascii
import os
import struct
import sys
from collections.abc import Callable, Iterator
from urllib.parse import unquote_to_bytes

from onlap import errors
from onlap.errors import shown
from onlap.layers import tarformat as tar
from onlap.layers import tarsparse
from onlap.layers.tarformat import BLOCK, ZERO_BLOCK, Entry, bad, parse_decimal, parse_number

# name mode uid gid size mtime checksum type linkname magic+version (uname gname) devmajor devminor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")

_USTAR = b"ustar\00000"

# Types that have no data whatever their size field says; Go's archive/tar, isHeaderOnly.
_HEADER_ONLY = frozenset("123456")
_KNOWN = {
    b"\0": tar.FILE,
    b"0": tar.FILE,
    b"7": tar.FILE,  # contiguous
    b"S": tar.FILE,  # GNU sparse
    b"1": tar.HARDLINK,
    b"2": tar.SYMLINK,
    b"3": tar.CHAR,
    b"4": tar.BLOCK_DEVICE,
    b"5": tar.DIRECTORY,
    b"6": tar.FIFO,
    b"D": tar.DIRECTORY,  # GNU: a directory with the names in it as its data
}
_FILES = (b"\0", b"0", b"7")

# Headers that are no entries: pax records (x, and X of Solaris), global ones, GNU's long names and volume labels.
_META = b"xXgLKV"
_GLOBAL, _LONG_NAME, _LONG_LINK, _LABEL = b"gLKV"

_MAX_NUMBERS = 4096

# That of os.fsdecode(), which asks for more than is needed here.
_ENCODING = sys.getfilesystemencoding()


class TarReader:
    """The entries of one archive.

    ::

        for entry in reader:
            while piece := reader.piece():
                ...

    Args:
        next_chunk: gives the next bytes of the archive, at best 128 to 256 KiB, and none at its end. A chunk may be
            overwritten once the next one is asked for.

    Attributes:
        position: how many bytes of the archive were read so far.
        marked_end: whether the archive's end marker was met.
    """

    def __init__(self, next_chunk: Callable[[], bytes | memoryview]) -> None:
        self._next_chunk = next_chunk
        self._chunk = memoryview(b"")
        self._at = 0  # in the chunk
        self._before = 0  # bytes of the archive before the chunk
        self._left = 0  # of the current entry's data
        self._padding = 0  # behind it
        self._name: str | None = None
        self._globals: list[tuple[str, bytes]] = []
        self._numbers: dict[bytes, int] = {}
        self.marked_end = False

    @property
    def position(self) -> int:
        return self._before + self._at

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> Entry | None:
        """The next entry; None at the end. Data of the current one that was not taken is passed over.

        Raises:
            InvalidArgument: what comes next is no tar entry, or a malformed one.
            DataLoss: the archive ends in the middle of an entry.
        """
        records: list[tuple[str, bytes]] | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        start: int | None = None
        while True:
            if self._left or self._padding:
                self._pass(self._left + self._padding)
                self._left = self._padding = 0
            header = self._header()
            if header is None:
                if start is not None:
                    raise self._truncated(start)
                return None
            offset = self.position - BLOCK
            if start is None:
                start = offset
            flag = header[156]
            if flag not in _META:
                return self._entry(header, start, records, long_name, long_link)
            if flag == _GLOBAL:
                self._global(self._records(header, offset))
            elif flag == _LONG_NAME:
                long_name = tar.cut(self._meta(header, offset))
            elif flag == _LONG_LINK:
                long_link = tar.cut(self._meta(header, offset))
            elif flag != _LABEL:
                records = self._records(header, offset)

    def piece(self) -> memoryview:
        """The next piece of the current entry's data, empty at its end; valid until the reader is used again."""
        left = self._left
        if not left:
            return self._chunk[:0]
        at = self._at
        available = len(self._chunk) - at
        if not available:
            self._fill()
            at = 0
            available = len(self._chunk)
        size = min(available, left)
        self._left = left - size
        self._at = end = at + size
        return self._chunk[at:end]

    def drain(self) -> None:
        """Read what follows the end of the archive; all of it belongs to its digest."""
        while True:
            self._before += len(self._chunk)
            self._at = 0
            self._chunk = memoryview(self._next_chunk())
            if not self._chunk:
                return

    # Bytes

    def _fill(self) -> None:
        self._before += len(self._chunk)
        self._at = 0
        self._chunk = memoryview(self._next_chunk())
        if not self._chunk:
            raise self._truncated(self._before)

    def _truncated(self, offset: int) -> errors.DataLoss:
        what = f"in entry {shown(self._name)}" if self._name is not None else "in a header"
        return errors.DataLoss(f"the archive ends at byte {self.position}, {what} (byte {offset})", key=self._name)

    def _pass(self, count: int) -> None:
        while count > (available := len(self._chunk) - self._at):
            count -= available
            self._at = len(self._chunk)
            self._fill()
        self._at += count

    def _take(self, count: int) -> bytes:
        if len(self._chunk) - self._at >= count:
            self._at += count
            return bytes(self._chunk[self._at - count : self._at])
        parts = bytearray()
        while count > len(parts):
            if self._at == len(self._chunk):
                self._fill()
            end = min(len(self._chunk), self._at + count - len(parts))
            parts += self._chunk[self._at : end]
            self._at = end
        return bytes(parts)

    def _block(self) -> bytes:
        return self._take(BLOCK)

    def _data_block(self) -> bytes:
        """A block of the current entry's data, in which its sparse map is."""
        if self._left < BLOCK:
            raise ValueError("it is longer than the data")
        self._left -= BLOCK
        return self._take(BLOCK)

    def _begin(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    # Headers

    def _header(self) -> memoryview | None:
        """The next block, checked; None at the end of the archive."""
        self._name = None
        at = self._at
        if len(self._chunk) - at >= BLOCK:
            self._at = at + BLOCK
            header = self._chunk[at : at + BLOCK]
        else:
            if self._at == len(self._chunk) and not self._more():
                return None
            header = memoryview(self._take(BLOCK))
        if not header[0] and header == ZERO_BLOCK:
            self._end()
            return None
        expected: int | None = None
        try:
            expected = parse_number(header[148:156].tobytes())
        except ValueError:
            pass  # not a number, so it is no sum either
        if tar.checksum(header) != expected and tar.signed_checksum(header) != expected:
            offset = self.position - BLOCK
            if offset == 0:
                raise errors.InvalidArgument(
                    "this is no tar archive, nor one that is compressed with gzip, zstd, bzip2 or xz"
                )
            raise bad("its checksum is wrong", None, offset)
        return header

    def _more(self) -> bool:
        """Whether anything follows; fetches the next chunk."""
        self._before += len(self._chunk)
        self._at = 0
        self._chunk = memoryview(self._next_chunk())
        return bool(self._chunk)

    def _end(self) -> None:
        # The marker is two blocks of zeros. As Go's archive/tar: one at the very end will do, and anything else behind
        # it is an error.
        self.marked_end = True
        if self._at == len(self._chunk) and not self._more():
            return
        offset = self.position
        if self._take(BLOCK) != ZERO_BLOCK:
            raise bad("it follows a block of zeros, which is half of an end marker", None, offset)

    def _number(self, field: bytes) -> int:
        value = self._numbers.get(field)
        if value is None:
            value = parse_number(field)
            if len(self._numbers) < _MAX_NUMBERS:
                self._numbers[field] = value
        return value

    def _meta(self, header: memoryview, offset: int) -> bytes:
        size = tar.parse_size(header[124:136].tobytes(), None, offset)
        if size > tar.MAX_META:
            raise bad(f"{size} bytes of meta data; {tar.MAX_META} are the limit", None, offset)
        data = self._take(size)
        self._pass(-size % BLOCK)
        return data

    def _records(self, header: memoryview, offset: int) -> list[tuple[str, bytes]]:
        data = self._meta(header, offset)
        try:
            return tar.parse_records(data)
        except ValueError as error:
            raise bad(str(error), None, offset) from None

    def _global(self, records: list[tuple[str, bytes]]) -> None:
        # A later global header changes what it names and leaves the rest; no value removes.
        merged = dict(self._globals)
        merged.update(records)
        self._globals = [(key, value) for key, value in merged.items() if value]
        if sum(len(key) + len(value) for key, value in self._globals) > tar.MAX_META:
            raise bad(f"global records of more than {tar.MAX_META} bytes", None, self.position)

    def _entry(
        self,
        header: memoryview,
        offset: int,
        records: list[tuple[str, bytes]] | None,
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        (
            raw_name,
            raw_mode,
            raw_uid,
            raw_gid,
            raw_size,
            raw_mtime,
            _,
            flag,
            raw_link,
            magic,
            raw_major,
            raw_minor,
            prefix,
        ) = _HEADER.unpack_from(header)
        raw_name = raw_name.partition(b"\0")[0]
        if magic == _USTAR and prefix[0]:
            # star: "tar\0" at the end of the block, access and change times behind a shorter prefix.
            prefix = tar.cut(prefix[:131] if header[508:512].tobytes() == b"tar\0" else prefix)
            raw_name = prefix + b"/" + raw_name
        name = (raw_name if long_name is None else long_name).decode(_ENCODING, "surrogateescape")
        self._name = name
        type = _KNOWN.get(flag)
        if type is None:
            raise bad(f"type {flag!r} is not supported", name, offset)
        number = self._number
        known = self._numbers
        try:
            # Few modes and owners come again and again; a file's time is its own.
            mode = (known[raw_mode] if raw_mode in known else number(raw_mode)) & 0o7777
            uid = known[raw_uid] if raw_uid in known else number(raw_uid)
            gid = known[raw_gid] if raw_gid in known else number(raw_gid)
            mtime = parse_number(raw_mtime)
        except ValueError:
            raise bad("its mode, owner or time is not a number", name, offset) from None
        entry = Entry(name, type, mode, uid, gid, 0, mtime * 1_000_000_000, offset=offset)
        if raw_link[0] or long_link is not None:
            entry.linkname = os.fsdecode(tar.cut(raw_link) if long_link is None else long_link)
        if type == tar.CHAR or type == tar.BLOCK_DEVICE:
            self._device(entry, raw_major, raw_minor)
        entry.size = tar.parse_size(raw_size, name, offset)
        if records is not None or self._globals:
            self._apply_records(entry, self._globals + (records or []), long_name, long_link)
            name = entry.name
        if flag in _FILES and name.endswith("/"):
            # Before directories had a type of their own, a slash told them apart.
            type = entry.type = tar.DIRECTORY
        if type in _HEADER_ONLY:
            # The names in a GNU 'D' are data; the size of every other of these is a remark.
            self._begin(entry.size if flag == b"D" else 0)
            entry.size = entry.stored = 0
        else:
            entry.stored = entry.size
            self._begin(entry.size)
            if flag == b"S":
                tarsparse.read_old(entry, header, self._block)
            elif records is not None:
                tarsparse.read_pax(entry, records, self._data_block)
            if entry.sparse is not None:
                entry.stored = self._left
                tarsparse.check(entry)
        if not 0 <= uid <= tar.MAX_ID or not 0 <= gid <= tar.MAX_ID or records is not None or self._globals:
            self._check(entry)
        elif not -tar.MAX_SECONDS <= mtime <= tar.MAX_SECONDS:
            raise bad("its time is out of range", name, offset)
        return entry

    def _device(self, entry: Entry, major: bytes, minor: bytes) -> None:
        try:
            entry.devmajor, entry.devminor = self._number(major), self._number(minor)
        except ValueError:
            raise bad("its device number is not a number", entry.name, entry.offset) from None

    def _check(self, entry: Entry) -> None:
        name, link = entry.name, entry.linkname
        self._name = name
        if not 0 <= entry.uid <= tar.MAX_ID or not 0 <= entry.gid <= tar.MAX_ID:
            raise bad(f"its owner {entry.uid}:{entry.gid} is out of range", name, entry.offset)
        if not -tar.MAX_SECONDS <= entry.mtime_ns // 1_000_000_000 <= tar.MAX_SECONDS:
            raise bad("its time is out of range", name, entry.offset)
        if "\0" in name or "\0" in link:
            raise bad("its name or its link holds a NUL", name, entry.offset)

    # Extended records

    def _apply_records(
        self, entry: Entry, records: list[tuple[str, bytes]], long_name: bytes | None, long_link: bytes | None
    ) -> None:
        xattrs: dict[str, bytes] = {}
        encoded: dict[str, bytes] = {}
        skipped: list[str] = []
        key = ""
        try:
            for key, value in records:
                # An empty value takes back what a global header said; the entry's own header stands.
                if key == "path":
                    if long_name is None and value:
                        entry.name = os.fsdecode(value)
                elif key == "linkpath":
                    if long_link is None and value:
                        entry.linkname = os.fsdecode(value)
                elif key.startswith(tar.XATTR_PREFIX):
                    xattrs[key[len(tar.XATTR_PREFIX) :]] = value
                elif key.startswith(tar.LIBARCHIVE_XATTR_PREFIX):
                    encoded[_unquoted(key[len(tar.LIBARCHIVE_XATTR_PREFIX) :])] = _from_base64(value)
                elif key.startswith(("SCHILY.acl.", "RHT.security.", "SCHILY.fflags")):
                    skipped.append("acl" if "acl" in key else "xattr")
                elif not value:
                    continue
                elif key == "mtime":
                    entry.mtime_ns = tar.parse_time(value)
                elif key == "atime":
                    entry.atime_ns = tar.parse_time(value)
                elif key == "size":
                    entry.size = parse_decimal(value)
                    if entry.size > tar.MAX_SECONDS:
                        raise ValueError("too large")
                elif key == "uid":
                    entry.uid = parse_decimal(value)
                elif key == "gid":
                    entry.gid = parse_decimal(value)
                elif key == "SCHILY.devmajor":
                    entry.devmajor = parse_decimal(value)
                elif key == "SCHILY.devminor":
                    entry.devminor = parse_decimal(value)
        except ValueError as error:
            raise bad(f"its pax record {shown(key)}: {error}", entry.name, entry.offset) from None
        # bsdtar writes both forms; in its own the name and the value are encoded, and it means the same.
        merged = {**encoded, **xattrs}
        if merged:
            entry.xattrs = merged
        entry.skipped = tuple(skipped)


def _unquoted(key: str) -> str:
    return os.fsdecode(unquote_to_bytes(os.fsencode(key)))


def _from_base64(value: bytes) -> bytes:
    # libarchive leaves the padding out.
    try:
        return binascii.a2b_base64(value + b"=" * (-len(value) % 4))
    except binascii.Error as error:
        raise ValueError(f"not base64 ({error})") from None
