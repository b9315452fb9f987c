"""Reading tar archives as a stream: ustar, pax, GNU, star and v7, and all forms of sparse files.

Written for speed: a header costs one unpack and one checksum, data is returned as views of the chunks read, and nothing
about an entry is kept once the next one is requested. Most headers of an archive are those of files and directories
that differ from an earlier one only in name, size and time. Of such headers, only these fields are parsed.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from zlib import adler32

from onlap import errors
from onlap.errors import shown
from onlap.layers.format import sparse_files, tar
from onlap.layers.format.tar import BLOCK, ZERO_BLOCK, Entry, bad, parse_decimal, parse_number, parse_octal

# name mode uid gid size mtime (checksum) type linkname magic+version (uname gname) devmajor devminor prefix trailer
_HEADER = struct.Struct("100s8s8s8s12s12s8xc100s8s64x8s8s155s8x4s")
# name mode+uid+gid size mtime checksum, type to devminor, prefix+trailer; a number is split from the byte that ends it
_USUAL = struct.Struct("100s24s11sc11sc6s2s189s167s")
_USUAL_TYPES = (b"0", b"5")
_ENDS = frozenset((b"\0", b" ", b"\0 ", b" \0"))
_HEAD = 148  # bytes of a header before its checksum
_REST = 345  # bytes before its prefix
_NO_REST = bytes(BLOCK - _REST)
_NO_TRAILER = bytes(12)

# Go's archive/tar accepts any version of ustar, but only one of GNU; anything else is a v7 header, which ends before
# the devices and the prefix.
_USTAR = b"ustar\0"
_GNU = b"ustar  \0"
_STAR_TRAILER = b"tar\0"
# The access and change times in a star header, and in a GNU one.
_STAR_TIMES = (slice(476, 488), slice(488, 500))
_GNU_TIMES = (slice(345, 357), slice(357, 369))

# Types without data, whatever their size field says; Go's archive/tar, isHeaderOnly.
_HEADER_ONLY = frozenset("123456")
_LABEL = "V"
# Contiguous files (7), GNU's directories with a list of names (D) and Solaris's own pax headers (X) are not among them:
# Go returns them as entries of unknown types, so containerd and Docker refuse them and scanners do not see them.
_KNOWN = {
    b"\0": tar.FILE,
    b"0": tar.FILE,
    b"S": tar.FILE,  # GNU sparse
    b"1": tar.HARDLINK,
    b"2": tar.SYMLINK,
    b"3": tar.CHAR,
    b"4": tar.BLOCK_DEVICE,
    b"5": tar.DIRECTORY,
    b"6": tar.FIFO,
    b"V": _LABEL,  # GNU: a volume label
}

# Headers that are not entries: pax records, global ones, GNU's long names and links.
_META = b"xgLK"
_GLOBAL, _LONG_NAME, _LONG_LINK, _OLD_SPARSE = b"gLKS"

_MAX_NUMBERS = 4096
# Parsed parts of headers, of some 300 bytes each.
_MAX_PARSED = 1024

# That of os.fsdecode(), which does more than is needed here.
_ENCODING = sys.getfilesystemencoding()


class TarReader:
    """The entries of one archive.

    ::

        for entry in reader:
            while piece := reader.piece():
                ...

    Args:
        next_chunk: returns the next bytes of the archive, ideally 128 to 256 KiB, and none at its end. A chunk may be
            overwritten once the next one is requested.
        start: how many bytes of the archive were skipped before.

    Attributes:
        position: how many bytes of the archive were read or skipped so far.
        marked_end: whether the archive's end marker was found. Without one, the archive ends after an entry or in its
            padding: umoci's ``insert`` writes such archives, and Go's archive/tar accepts them.
    """

    def __init__(self, next_chunk: Callable[[], bytes | memoryview], start: int = 0) -> None:
        self._next_chunk = next_chunk
        self._chunk = memoryview(b"")
        self._at = 0  # in the chunk
        self._before = start  # bytes of the archive before the chunk
        self._left = 0  # of the current entry's data
        self._padding = 0  # behind it
        self._name: str | None = None
        self._numbers: dict[bytes, int] = {}
        self._meta_fields = b""
        # What recurs in headers, parsed: mode, uid and gid; and type to devminor, which become the type, the sum of
        # their bytes, and whether a prefix may follow.
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._middles: dict[bytes, tuple[str, int, bool]] = {}
        self.marked_end = False

    @property
    def position(self) -> int:
        return self._before + self._at

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> Entry | None:
        """The next entry; None at the end. Unread data of the current one is skipped.

        Raises:
            InvalidArgument: what follows is not a tar entry, or is malformed.
            DataLoss: the archive ends within an entry.
        """
        usual = self._like_an_earlier_one()
        if usual is not None:
            return usual
        records: Mapping[str, bytes] | None = None
        long_name = long_link = b""
        start: int | None = None
        while True:
            header = self._header() if self._pass_entry() else None
            if header is None:
                if start is not None:
                    raise self._truncated(start)
                return None
            offset = self.position - BLOCK
            if start is None:
                start = offset
            flag = header[156]
            if flag not in _META:
                entry = self._entry(header, start, records, long_name, long_link)
                if entry.type != _LABEL:
                    return entry
            elif flag == _LONG_NAME:
                long_name = tar.cut(self._meta(header, offset))
                continue
            elif flag == _LONG_LINK:
                long_link = tar.cut(self._meta(header, offset))
                continue
            else:
                records = self._records(header, offset)
                if flag != _GLOBAL:
                    continue
            # Go's archive/tar returns global headers and labels as entries: headers before them belong to them, and
            # they do not affect other entries.
            records = start = None
            long_name = long_link = b""

    def piece(self, most: int = sys.maxsize) -> memoryview:
        """The next piece of the current entry's data; empty at its end. Valid until the reader is used again.

        Args:
            most: how many bytes of it at most.
        """
        left = min(self._left, most)
        if not left:
            return self._chunk[:0]
        at = self._at
        available = len(self._chunk) - at
        if not available:
            self._fill()
            at = 0
            available = len(self._chunk)
        size = min(available, left)
        self._left -= size
        self._at = end = at + size
        return self._chunk[at:end]

    def omit(self) -> None:
        """Go on as if the rest of the current entry's data had been read: the chunks that follow do not have it."""
        self._pass(min(self._left, len(self._chunk) - self._at))
        self._before += self._left
        self._left = 0

    def drain(self) -> None:
        """Read what follows the end of the archive; it is part of the digest."""
        while self._more():
            pass

    # Bytes

    def _more(self) -> bool:
        """Fetch the next chunk; return whether there is one."""
        self._before += len(self._chunk)
        self._at = 0
        self._chunk = memoryview(self._next_chunk())
        return bool(self._chunk)

    def _fill(self) -> None:
        if not self._more():
            raise self._truncated(self._before)

    def _pass_entry(self) -> bool:
        """Skip the rest of the current entry; return False if the archive ends within its padding."""
        left, padding = self._left, self._padding
        self._left = self._padding = 0
        if len(self._chunk) - self._at >= left + padding:
            self._at += left + padding
            return True
        self._pass(left)
        while padding > (available := len(self._chunk) - self._at):
            padding -= available
            if not self._more():
                return False
        self._at += padding
        return True

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

    def _data_block(self) -> bytes:
        """A block of the current entry's data, for the sparse map at its start."""
        if self._left < BLOCK:
            raise ValueError("it is longer than the data")
        self._left -= BLOCK
        return self._take(BLOCK)

    # Headers

    def _like_an_earlier_one(self) -> Entry | None:
        """The next entry, if its header is in the chunk, and differs from earlier ones only in name, size and time."""
        if self._at == len(self._chunk) and not self._left:
            self._more()
        at = self._at + self._left + self._padding
        chunk = self._chunk
        if at + BLOCK > len(chunk):
            return None
        name, owner, size, size_end, mtime, mtime_end, total, total_end, middle, rest = _USUAL.unpack_from(chunk, at)
        known = self._middles.get(middle)
        ids = self._owners.get(owner)
        if (
            known is None
            or ids is None
            or not (size.isdigit() and mtime.isdigit() and total.isdigit())
            or size_end not in _ENDS
            or mtime_end not in _ENDS
            or total_end not in _ENDS
        ):
            return None
        type, expected, may_have_prefix = known
        mode, uid, gid = ids
        end = name.find(0)
        if end >= 0:
            name = name[:end]
        # What is expected lacks the 1 that this adler32 adds (see _parse).
        expected += adler32(chunk[at : at + _HEAD]) & 0xFFFF
        if rest != _NO_REST:
            if not may_have_prefix or not rest[0] or not rest.endswith(_NO_TRAILER):
                return None
            expected += (adler32(rest) & 0xFFFF) - 1
            name = tar.cut(rest) + b"/" + name
        try:
            if int(total, 8) != expected:
                return None
            count = int(size, 8)
            if type != tar.FILE:
                count = 0
            entry = Entry(
                name.decode(_ENCODING, "surrogateescape"),
                type,
                mode,
                uid,
                gid,
                count,
                int(mtime, 8) * 1_000_000_000,
                offset=self._before + at,
            )
        except ValueError:  # a digit that is not octal
            return None
        self._name = entry.name
        self._at = at + BLOCK
        self._left = count
        self._padding = -count % BLOCK
        return entry

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
            expected = parse_octal(header[148:156].tobytes())
        except ValueError:
            pass  # neither a number nor, therefore, a checksum
        if tar.checksum(header) != expected and tar.signed_checksum(header) != expected:
            offset = self.position - BLOCK
            if offset == 0:
                raise errors.InvalidArgument(
                    "this is not a tar archive, nor one that is compressed with gzip, zstd, bzip2 or xz"
                )
            raise bad("its checksum is wrong", None, offset)
        return header

    def _end(self) -> None:
        # The marker is two blocks of zeros. As in Go's archive/tar, one at the very end is enough, and anything else
        # after it is an error.
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
        # Go also refuses a header for malformed fields that it does not use. Usually all fields but the size recur.
        fields = header[100:124].tobytes() + header[136:148].tobytes() + header[257:].tobytes()
        if fields != self._meta_fields:
            self._parse(header, offset)
            self._meta_fields = fields
        size = tar.parse_size(header[124:136].tobytes(), None, offset)
        if size > tar.MAX_META:
            raise bad(f"{size} bytes of metadata; the limit is {tar.MAX_META}", None, offset)
        self._padding = -size % BLOCK
        return self._take(size)

    def _records(self, header: memoryview, offset: int) -> Mapping[str, bytes]:
        data = self._meta(header, offset)
        try:
            return tar.parse_records(data)
        except ValueError as error:
            raise bad(str(error), None, offset) from None

    def _parse(self, header: memoryview, offset: int, long_name: bytes = b"", long_link: bytes = b"") -> Entry:
        """The fields of any header; the type is empty if it is not that of an entry."""
        (
            raw_name,
            raw_mode,
            raw_uid,
            raw_gid,
            raw_size,
            raw_mtime,
            flag,
            raw_link,
            magic,
            raw_major,
            raw_minor,
            prefix,
            trailer,
        ) = _HEADER.unpack_from(header)
        raw_name = raw_name.partition(b"\0")[0]
        number = self._number
        known = self._numbers
        major = minor = 0
        try:
            # A few modes and owners recur; mtimes do not.
            mode = (known[raw_mode] if raw_mode in known else number(raw_mode)) & 0o7777
            uid = known[raw_uid] if raw_uid in known else number(raw_uid)
            gid = known[raw_gid] if raw_gid in known else number(raw_gid)
            mtime = parse_number(raw_mtime)
            if magic.startswith(_USTAR) or magic == _GNU:
                major = known[raw_major] if raw_major in known else number(raw_major)
                minor = known[raw_minor] if raw_minor in known else number(raw_minor)
                if magic == _GNU:
                    prefix = _gnu_prefix(header, prefix)
                elif trailer == _STAR_TRAILER:
                    for field in _STAR_TIMES:
                        parse_number(header[field].tobytes())
                    prefix = prefix[:131]
                if prefix and prefix[0]:
                    raw_name = tar.cut(prefix) + b"/" + raw_name
        except ValueError:
            name = os.fsdecode(long_name or raw_name)
            raise bad("its mode, owner, time or device is not a number", name, offset) from None
        name = (long_name or raw_name).decode(_ENCODING, "surrogateescape")
        size = tar.parse_size(raw_size, name, offset)
        type = _KNOWN.get(flag, "")
        entry = Entry(name, type, mode, uid, gid, size, mtime * 1_000_000_000, offset=offset)
        if raw_link[0] or long_link:
            entry.linkname = os.fsdecode(long_link or tar.cut(raw_link))
        if type == tar.CHAR or type == tar.BLOCK_DEVICE:
            entry.devmajor, entry.devminor = major, minor
        elif (
            flag in _USUAL_TYPES
            and not raw_link[0]
            and (magic == _GNU or magic.startswith(_USTAR))
            and 0 <= uid <= tar.MAX_ID
            and 0 <= gid <= tar.MAX_ID
            and len(self._middles) < _MAX_PARSED
            and len(self._owners) < _MAX_PARSED
        ):
            # An adler32 is 1 more than the sum of its bytes: the total lacks what the head's will add to it.
            total = tar.checksum(header) - sum(adler32(part) & 0xFFFF for part in (header[:_HEAD], header[_REST:])) + 1
            self._middles[header[156:_REST].tobytes()] = (type, total, magic != _GNU)
            self._owners[header[100:124].tobytes()] = (mode, uid, gid)
        return entry

    def _entry(
        self,
        header: memoryview,
        offset: int,
        records: Mapping[str, bytes] | None,
        long_name: bytes,
        long_link: bytes,
    ) -> Entry:
        entry = self._parse(header, offset, long_name, long_link)
        self._name = entry.name
        flag = header[156]
        if not entry.type:
            raise bad(f"type {bytes([flag])!r} is not supported", entry.name, offset)
        sparse = records is not None and self._apply_records(entry, records, long_name, long_link)
        if not flag and entry.name.endswith("/"):
            # Before directories had their own type, a trailing slash marked them. Since then it means nothing.
            entry.type = tar.DIRECTORY
        if entry.type in _HEADER_ONLY:
            entry.size = 0
        self._left = entry.stored = entry.size
        self._padding = -entry.size % BLOCK
        if flag == _OLD_SPARSE:
            if header[257:265] != _GNU:
                raise bad("a sparse file of star is not supported", entry.name, offset)
            sparse_files.read_old(entry, header, lambda: self._take(BLOCK))
            sparse_files.check(entry)
        elif sparse and records is not None:
            self._sparse(entry, records)
        if records is not None or not 0 <= entry.uid <= tar.MAX_ID or not 0 <= entry.gid <= tar.MAX_ID:
            self._check(entry)
        return entry

    def _check(self, entry: Entry) -> None:
        name, link = entry.name, entry.linkname
        self._name = name
        if not 0 <= entry.uid <= tar.MAX_ID or not 0 <= entry.gid <= tar.MAX_ID:
            raise bad(f"its owner {entry.uid}:{entry.gid} is out of range", name, entry.offset)
        if "\0" in name or "\0" in link:
            raise bad("its name or its link contains a NUL", name, entry.offset)

    # Extended records

    def _sparse(self, entry: Entry, records: Mapping[str, bytes]) -> None:
        try:
            if not sparse_files.is_pax(records):
                return
            if entry.type in _HEADER_ONLY:
                raise ValueError("it is not a file")
            sparse_files.read_pax(entry, records, self._data_block)
        except ValueError as error:
            raise bad(f"its sparse map: {error}", entry.name, entry.offset) from None
        entry.stored = self._left
        sparse_files.check(entry)

    def _apply_records(self, entry: Entry, records: Mapping[str, bytes], long_name: bytes, long_link: bytes) -> bool:
        """Apply the pax records of an entry over its header; return whether some are those of a sparse file."""
        xattrs: dict[str, bytes] = {}
        sparse = False
        skipped: list[str] = []
        key = ""
        try:
            for key, value in records.items():
                if key == "mtime" and value:  # the most common one
                    entry.mtime_ns = tar.parse_time(value)
                elif key.startswith(tar.XATTR_PREFIX):
                    xattrs[key[len(tar.XATTR_PREFIX) :]] = value
                elif key.startswith(("SCHILY.acl.", "RHT.security.", "SCHILY.fflags")):
                    skipped.append("acl" if "acl" in key else "xattr")
                elif not value:
                    continue  # without a value, the entry's own header applies
                elif key == "path":
                    if not long_name:
                        entry.name = os.fsdecode(value)
                elif key == "linkpath":
                    if not long_link:
                        entry.linkname = os.fsdecode(value)
                elif key == "atime":
                    entry.atime_ns = tar.parse_time(value)
                elif key == "ctime":
                    tar.parse_time(value)  # only checked, as in Go
                elif key == "size":
                    entry.size = parse_decimal(value)
                elif key == "uid":
                    entry.uid = parse_decimal(value)
                elif key == "gid":
                    entry.gid = parse_decimal(value)
                elif key.startswith("GNU.sparse."):
                    sparse = True
        except ValueError as error:
            raise bad(f"its pax record {shown(key)}: {error}", entry.name, entry.offset) from None
        if xattrs:
            entry.xattrs = xattrs
        if skipped:
            entry.skipped = tuple(skipped)
        return sparse


def _gnu_prefix(header: memoryview, prefix: bytes) -> bytes:
    """The prefix of the name in a GNU header, which normally has none.

    Before Go 1.8, archive/tar wrote one over the access and change times; it still reads it if these are not numbers
    (reader.go, readHeader).
    """
    try:
        for field in _GNU_TIMES:
            if header[field.start]:
                parse_number(header[field].tobytes())
    except ValueError:
        prefix = tar.cut(prefix)
        return prefix if prefix.isascii() else b""
    return b""
