"""Backups: everything that was committed as one archive, consistent while other programs use the root.

::

    backup.json                       the rest of the catalog (:class:`Head`)
    snapshots/<id>/record             all records (onlap.catalog.background.sidecars), before the first tree
    snapshots/<id>/manifest           what a committed layer holds (onlap.trees.manifest), before its tree
    snapshots/<id>/fs/...             the tree as it lies on the disk, in the order of its manifest
    content/blobs/sha256/<hex>        the pinned blobs
    end.json                          a digest of all entries before it (:class:`Seal`)

So the archive has the layout of a root. What no archive can hold is in the manifest only: sockets, and xattrs with a
"=" in their names.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from sqlite3 import Connection
from typing import Any, BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import StrPath
from onlap.catalog import pins, records
from onlap.catalog.background import sidecars
from onlap.catalog.disk.boot import boot_id
from onlap.catalog.pins import Pin
from onlap.catalog.records import COMMITTED, Record
from onlap.catalog.runs import LABEL
from onlap.catalog.volatile import VOLATILE
from onlap.check.backups.summary import Backup
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images import records as images
from onlap.layers.format import sparse_files, tar
from onlap.layers.format.writer import TarWriter
from onlap.layers.stream.digests import PREFIX
from onlap.layers.stream.sink import ArchiveSink
from onlap.progress import Callback, Reporter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.snapshots.transfer import archives
from onlap.trees import manifest, walk
from onlap.trees.manifest import Entry, opened_unchanged
from onlap.trees.meta import read_xattrs
from onlap.trees.usage import usage
from onlap.trees.walk import opened
from onlap.workspaces.records import UNSYNCED

FORMAT = 1
HEAD = "backup.json"
END = "end.json"
BLOBS = "content/blobs/sha256"
_CHUNK = 256 * 1024
_ZEROS = bytes(1 << 20)
_UNIT = 512  # bytes of st_blocks
# What happens to the files of an active snapshot while they are read.
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Head(NamedTuple):
    """The first entry of a backup.

    Attributes:
        user: whose root it is.
        created_ns: when the catalog was read, in nanoseconds since the epoch.
        sequence: the highest id that a snapshot ever had.
        settings: of the root.
        snapshots: the ids of the snapshots, in the order of the archive.
        images: the rows of the table of images.
        pins: the pins on snapshots and blobs of the backup, but for those of running programs.
    """

    user: int
    created_ns: int
    sequence: int
    settings: Mapping[str, str]
    snapshots: Sequence[int]
    images: Sequence[images.ImageRecord]
    pins: Sequence[Pin]

    @property
    def blobs(self) -> list[str]:
        """The digests of the blobs, in the order of the archive."""
        return sorted({pin.digest for pin in self.pins if pin.digest is not None})

    def encode(self) -> bytes:
        """The content of the entry."""
        rows = {"images": [each._asdict() for each in self.images], "pins": [each._asdict() for each in self.pins]}
        return json.dumps({"format": FORMAT, **self._asdict(), **rows}, indent=1).encode()


class Seal:
    """A digest of the entries of a backup: their names, attributes and content."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._entries = 0

    def add(self, entry: tar.Entry, digest: str) -> None:
        """Add an entry; the digest is that of its content, in hexadecimal, and empty unless it is a file."""
        numbers = (entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_ns, entry.devmajor, entry.devminor)
        xattrs = sorted((name, value.hex()) for name, value in (entry.xattrs or {}).items())
        self._hash.update(json.dumps([entry.name, entry.type, *numbers, entry.linkname, xattrs, digest]).encode())
        self._entries += 1

    def encode(self) -> bytes:
        """The content of the last entry of the archive."""
        return json.dumps({"entries": self._entries, "digest": PREFIX + self._hash.hexdigest()}).encode()


def back_up(
    snapshotter: RecordedSnapshotter,
    content: ContentStore,
    out: StrPath | BinaryIO,
    *,
    active: bool,
    progress: Callback | None,
) -> Backup:
    """Write a backup; see :meth:`onlap.store.Store.backup`."""
    catalog = snapshotter.catalog
    encoding = archives.encoding_for(out, None, None, None)
    report = Reporter(progress, "backup", "bytes")
    with Lease(catalog, "backup") as lease:
        # What is read is pinned in the same transaction, so that all of it stays until the end.
        head, chosen = catalog.database.write(lambda c: _read(c, lease.owner, active))
        for record in chosen:
            if record.kind == COMMITTED:
                catalog.manifests.ensure(record)
        with (
            archives.opened(snapshotter, out) as file,
            ArchiveSink(file, encoding.compression) as sink,
        ):
            total = sum(_size(snapshotter, record) for record in chosen) + sum(map(content.size, head.blobs))
            report.total = total
            writer = _Writer(snapshotter, sink, report)
            writer.document(HEAD, head.encode(), head.created_ns)
            for record in chosen:
                sidecar = catalog.sidecars.expected(_synced(record))
                data = sidecars.encode(sidecar._replace(settings=_lasting(sidecar.settings)))
                writer.document(f"snapshots/{record.id}/record", data, record.updated_ns)
            for record in chosen:
                with errors.translated("back up", key=record.name):
                    writer.snapshot(record)
            for digest in head.blobs:
                writer.blob(digest, content.path(digest))
            writer.end()
            size = sink.finish().size
            if file is not out:
                file.flush()
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    os.fsync(file.fileno())
    report.finish(total)
    return Backup(len(chosen), len(head.images), len(head.blobs), writer.files, size, dict(writer.skipped))


def _lasting(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that are true of another machine too, and after a boot of this one."""
    return {key: value for key, value in settings.items() if key not in ("epoch", VOLATILE)}


def _read(connection: Connection, owner: str, active: bool) -> tuple[Head, list[Record]]:
    """Read what belongs into a backup and pin it, in one transaction."""
    chosen: list[Record] = []
    after = 0
    while rows := records.page(connection, None, after, None):
        # The snapshots of a running program end with it.
        chosen += [row for row in rows if row.kind == COMMITTED or (active and LABEL not in row.labels)]
        after = rows[-1].id
    identifiers = [record.id for record in chosen]
    known = set(identifiers)
    kept = [pin for pin in pins.without_runs(connection) if pin.snapshot is None or pin.snapshot in known]
    head = Head(
        os.geteuid(),
        time.time_ns(),
        records.next_id(connection) - 1,
        _lasting(records.settings(connection)),
        identifiers,
        images.walk(connection),
        kept,
    )
    for identifier in identifiers:
        pins.pin(connection, owner, snapshot=identifier)
    for digest in head.blobs:
        pins.pin(connection, owner, digest=digest)
    return head, chosen


def _synced(record: Record) -> Record:
    """A snapshot's record without the note that a power cut may take its content: the archive has it."""
    if UNSYNCED not in record.labels or record.labels[UNSYNCED] != boot_id():
        return record
    return record._replace(labels={key: value for key, value in record.labels.items() if key != UNSYNCED})


def _size(snapshotter: RecordedSnapshotter, record: Record) -> int:
    catalog = snapshotter.catalog
    with errors.translated("measure", key=record.name):
        return catalog.usages.of(record)[1] if record.kind == COMMITTED else usage(catalog.layout.tree(record.id)).size


class _Writer:
    """Writes the entries of a backup."""

    def __init__(self, snapshotter: RecordedSnapshotter, sink: ArchiveSink, report: Reporter) -> None:
        self._catalog = snapshotter.catalog
        self._tar = TarWriter(sink.write)
        self._seal = Seal()
        self._report = report
        self._buffer = memoryview(bytearray(_CHUNK))
        self._done = 0  # bytes on the disk, as usage counts them
        self.files = 0
        self.skipped: Counter[str] = Counter()

    def document(self, name: str, data: bytes, mtime_ns: int) -> None:
        """Write a small entry of our own."""
        entry = tar.Entry(name, tar.FILE, 0o600, os.geteuid(), os.getegid(), len(data), mtime_ns)
        self._tar.begin(entry)
        self._tar.write(data)
        self._seal.add(entry, hashlib.sha256(data).hexdigest())

    def blob(self, digest: str, path: str) -> None:
        """Write a blob."""
        with errors.translated(f"read the blob {digest}", key=digest):
            found = self._file(f"{BLOBS}/{digest.removeprefix(PREFIX)}", path)
        if PREFIX + found != digest:
            raise _damaged(f"the blob {digest} is not what its digest says", digest)

    def _file(self, name: str, path: str) -> str:
        with opened(path, walk.OPEN_FILE) as fd:
            status = os.fstat(fd)
            entry = tar.Entry(name, tar.FILE, 0o600, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
            digest = self._content(fd, entry, status, active=False)
            self._seal.add(entry, digest)
        self._done += status.st_size
        return digest

    def snapshot(self, record: Record) -> None:
        """Write a snapshot's manifest and tree; raises OSError."""
        layout = self._catalog.layout
        with contextlib.ExitStack() as stack:
            expected = None
            if record.kind == COMMITTED:
                path = layout.manifest(record.id)
                self._file(f"snapshots/{record.id}/manifest", path)
                listed = stack.enter_context(open(path, "rb"))
                expected = manifest.iterate(listed, self._catalog.manifests.ensure(record))
            top = stack.enter_context(opened(layout.tree(record.id)))
            self._tree(record, top, expected)

    def _tree(self, record: Record, top: int, expected: Iterator[Entry] | None) -> None:
        prefix = f"snapshots/{record.id}/fs/"
        numbers: manifest.LinkNumbers = {}
        first_names: dict[int, tuple[str, str]] = {}
        links = manifest.Links()
        for found in manifest.places(top):
            try:
                xattrs = read_xattrs(walk.path_of(found.dir_fd, found.name), markers=True)
                entry = manifest.entry_of(found, numbers, "", xattrs)
                digest = self._entry(prefix, entry, found, first_names, active=expected is None)
            except OSError as error:
                if expected is None and error.errno in _VANISHED and found.path != ".":
                    self.skipped["vanished"] += 1
                    continue
                raise
            if expected is not None:
                entry = entry._replace(digest=digest)
                wanted = next(expected, None)
                if wanted is None or wanted.path != entry.path or manifest.differences(wanted, entry, links):
                    raise _changed(record, entry.path)
        if expected is not None and (wanted := next(expected, None)) is not None:
            raise _changed(record, wanted.path)

    def _entry(
        self,
        prefix: str,
        entry: Entry,
        found: walk.Entry,
        first_names: dict[int, tuple[str, str]],
        *,
        active: bool,
    ) -> str:
        """Write a file of a tree; returns the digest of its content."""
        self.files += 1
        name = prefix + ("" if entry.path == "." else entry.path)
        kind = tar.TYPES.get(stat.S_IFMT(entry.mode))
        if kind is None:
            if active:  # otherwise the manifest has it
                self.skipped["socket"] += 1
            return ""
        header = tar.Entry(
            name + "/" if kind == tar.DIRECTORY and entry.path != "." else name,
            kind,
            stat.S_IMODE(entry.mode),
            entry.uid,
            entry.gid,
            entry.size,
            entry.mtime_ns,
            entry.target,
            os.major(entry.rdev),
            os.minor(entry.rdev),
            {name: value for name, value in entry.xattrs.items() if tar.holds_xattr(name)},
        )
        if active and header.xattrs is not None and len(header.xattrs) < len(entry.xattrs):
            self.skipped["xattr"] += 1  # otherwise the manifest has it
        if entry.link in first_names:
            header.linkname, digest = first_names[entry.link]
            header.type, header.size, header.stored, header.xattrs = tar.HARDLINK, 0, 0, None
            header.devmajor = header.devminor = 0
            self._tar.begin(header)
            self._seal.add(header, "")
            return digest
        digest = ""
        if kind == tar.FILE:
            with opened_unchanged(found.name, found.dir_fd) as fd:
                digest = self._content(fd, header, found.status, active=active)
        else:
            self._tar.begin(header)
        self._seal.add(header, digest)
        self._done += found.status.st_blocks * _UNIT
        self._report(self._done, name)
        if entry.link:
            first_names[entry.link] = (name, digest)
        return digest

    def _content(self, fd: int, header: tar.Entry, status: os.stat_result, *, active: bool) -> str:
        """Write an entry with the content of an open file; returns its digest."""
        pieces = sparse_files.leave_out_holes(header, fd)
        self._tar.begin(header)
        digest = hashlib.sha256()
        position = done = 0
        for start, length in [*pieces, (header.size, 0)]:
            hash_zeros(digest, start - position)
            position, end = start, start + length
            while position < end:
                data = self._buffer[: min(_CHUNK, end - position)]
                count = os.preadv(fd, [data], position)
                if not count:
                    if not active:
                        raise errors.DataLoss(f"{shown(header.name)} is shorter than it was", key=header.name)
                    data[:] = bytes(len(data))  # the header with its size is written: as GNU tar does
                    count = len(data)
                digest.update(data[:count])
                self._tar.write(data[:count])
                position += count
                done += count
                self._report(self._done + min(done, status.st_blocks * _UNIT), header.name)
        return digest.hexdigest()

    def end(self) -> None:
        """Write the last entry, and the end of the archive."""
        data = self._seal.encode()
        self.document(END, data, time.time_ns())
        self._tar.end()


def hash_zeros(digest: Any, count: int) -> None:
    """Add a hole of so many bytes to the digest of a file."""
    while count > 0:
        digest.update(_ZEROS[:count])
        count -= len(_ZEROS)


def _changed(record: Record, path: str) -> errors.DataLoss:
    return _damaged(f"/{path} of snapshot {record.name} is not what was committed", record.name)


def _damaged(message: str, key: str) -> errors.DataLoss:
    return errors.DataLoss(shown(message), key=key, hint="see what is damaged with: onlap check --deep")
