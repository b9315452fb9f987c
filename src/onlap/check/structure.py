"""Whether records, trees, pins, mounts and images fit together.

Nothing is written, and nothing is read but the catalog, the sidecars and the documents of the images.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Collection, Iterator
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.background import sidecars
from onlap.catalog.disk.layout import QUARANTINE
from onlap.catalog.records import ACTIVE, COMMITTED, Record
from onlap.check.findings import Finding
from onlap.content.store import ContentStore
from onlap.images import records as images
from onlap.images.index import Index
from onlap.locks import abandoned
from onlap.mounts import mountinfo, namespaces
from onlap.mounts.unmount import attempts
from onlap.overlayfs.options import upperdirs
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.syscalls.files import exists, is_directory, is_file

# Seconds in which a removed tree is moved to the trash, also on a machine with much to do.
_MOMENT = 1.0


class Row(NamedTuple):
    """A snapshot's place in the chains of parents; the parent by its id."""

    name: str
    kind: str
    parent: int | None


class Structure:
    """The structure of a root.

    Args:
        snapshotter: of the root.
        content: of the root.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, content: ContentStore) -> None:
        self.snapshotter = snapshotter
        self.content = content
        self.catalog = snapshotter.catalog
        self.layout = snapshotter.catalog.layout
        self.snapshots = 0

    def findings(self) -> Iterator[Finding]:
        """All that does not fit.

        Raises:
            OnlapError: something cannot be looked at.
        """
        yield from self._database()
        rows = self.catalog.database.read(_rows)
        with errors.translated("check the root", key=self.layout.root):
            yield from self._permissions()
            yield from self._unknown_trees()
            yield from self._mounts(rows)
            yield from self._leftovers()
        yield from chains(rows)
        for record in self.catalog.walk(None):
            self.snapshots += 1
            yield from self._lasting_findings(record)
        yield from self._pins()
        yield from self._images()

    def _database(self) -> Iterator[Finding]:
        for said in self.catalog.database.read(_integrity):
            yield Finding("catalog-damaged", "catalog.db", detail=said)

    def _permissions(self) -> Iterator[Finding]:
        owner = os.geteuid()
        layout = self.layout
        # Others may pass through the root to what was opened to them; they may write nowhere.
        passed = (layout.root, layout.content, layout.database, layout.lock)
        for path in (*passed, layout.snapshots, layout.staging, layout.trash):
            if path == layout.content and not exists(path):
                continue  # nobody has needed it yet
            status = os.lstat(path)
            wrong = 0o022 if path in passed else 0o077
            if status.st_uid != owner or stat.S_IMODE(status.st_mode) & wrong:
                yield Finding(
                    "open-to-others",
                    os.path.relpath(path, self.layout.root),
                    detail=f"mode {stat.S_IMODE(status.st_mode):04o}",
                )

    def _unknown_trees(self) -> Iterator[Finding]:
        # A removed tree has no record any more for the moment before it is moved to the trash.
        for _ in attempts(_MOMENT):
            names = os.listdir(self.layout.snapshots)
            # Read after the directory: a tree comes into its place, and gets its record, under one lock.
            if not _without_record(names, self.catalog.database.read(records.ids)):
                return
        try:
            # Under that lock: none is on its way.
            known = self.catalog.database.write(records.ids)
        except (errors.FailedPrecondition, errors.ResourceExhausted):
            # A disk that is full or read-only: none is on its way either.
            known = self.catalog.database.read(records.ids)
        for name in _without_record(names, known):
            yield Finding("tree-unknown", f"snapshots/{name}")

    def _mounts(self, rows: dict[int, Row]) -> Iterator[Finding]:
        place = mountinfo.place_of(self.layout.snapshots)
        by_path = re.compile(re.escape(os.fsencode(self.layout.snapshots)) + rb"/([0-9]+)/fs")
        by_place = re.compile(re.escape(place.path if place is not None else b"") + rb"/([0-9]+)/fs(?:/|$)")
        seen = set()
        for text in namespaces.tables():
            for entry in mountinfo.parse(text, b" - overlay ", b"/fs"):
                if entry.options.split(b",")[0] != b"rw":
                    continue
                if entry.fstype == b"overlay":
                    found = [by_path.fullmatch(path) for path in upperdirs(entry.super_options)]
                else:
                    found = [by_place.match(entry.root)] if place is not None and entry.device == place.device else []
                for row in (rows.get(int(each[1])) for each in found if each):
                    if row is not None and row.kind == COMMITTED and (row.name, entry.mountpoint) not in seen:
                        seen.add((row.name, entry.mountpoint))
                        yield Finding("committed-mounted", row.name, detail=f"at {errors.shown(entry.mountpoint)}")

    def _leftovers(self) -> Iterator[Finding]:
        for name in abandoned(self.layout.staging):
            yield Finding("staging-left", f"staging/{name}")
        for name in sorted(os.listdir(self.layout.trash)):
            yield Finding("trash-waiting", f"trash/{name}")
        runs = f"{self.layout.root}/runs"
        if is_directory(runs):
            for name in abandoned(runs):
                yield Finding("run-left", f"runs/{name}")

    def _lasting_findings(self, record: Record) -> list[Finding]:
        """What does not fit of a snapshot; looked at again when its record was changed or removed meanwhile."""
        now: Record | None = record
        while now is not None:
            failure = None
            try:
                found = list(self._findings_of(now))
            except OSError as error:
                found, failure = [], error
            if not found and failure is None:
                break
            seen, now = now, self.catalog.database.read(lambda c: records.by_id(c, record.id))
            if seen != now:
                continue
            if failure is not None:
                raise errors.from_oserror(failure, doing="check snapshot", key=record.name) from failure
            return found
        return []

    def _findings_of(self, record: Record) -> Iterator[Finding]:
        places = (self.layout.snapshot(record.id), self.layout.tree(record.id))
        if not all(is_directory(place, follow=False) for place in places):
            aside = is_directory(f"{self.layout.snapshot(record.id)}/{QUARANTINE}")
            yield Finding("tree-quarantined" if aside else "tree-missing", record.name)
            return
        overlay = isinstance(self.snapshotter, OverlaySnapshotter)
        if overlay and record.kind == ACTIVE and not is_directory(self.layout.work(record.id)):
            yield Finding("workdir-missing", record.name)
        status = os.lstat(self.layout.snapshot(record.id))
        if stat.S_IMODE(status.st_mode) & 0o022 or status.st_uid != os.geteuid():
            yield Finding("open-to-others", record.name, detail=f"mode {stat.S_IMODE(status.st_mode):04o}")
        if record.kind == COMMITTED and not record.empty:  # an empty one is made again after a power cut, without it
            yield from self._manifest(record)
        yield from self._sidecar(record)

    def _manifest(self, record: Record) -> Iterator[Finding]:
        digest = self.catalog.database.read(lambda c: records.manifest(c, record.id))
        if digest is not None and not is_file(self.layout.manifest(record.id)):
            yield Finding("manifest-missing", record.name)

    def _sidecar(self, record: Record) -> Iterator[Finding]:
        # Before the sidecar is read, since one that is completed meanwhile was due until then.
        is_due = self.catalog.database.read(lambda c: records.is_due(c, record.id))
        if not self.catalog.sidecars.is_there(record):
            yield Finding("sidecar-missing", record.name)
            return
        try:
            found = sidecars.read(self.layout.record(record.id))
        except errors.NotFound:
            return  # removed meanwhile
        except errors.OnlapError as error:
            yield Finding("sidecar-damaged", record.name, detail=error.message)
            return
        expected = self.catalog.sidecars.expected(record)
        if found.manifest is None and is_due:  # the digest of one that was made since then is written into it next
            found = found._replace(manifest=expected.manifest)
        if found != expected:
            yield Finding("sidecar-damaged", record.name)

    def _pins(self) -> Iterator[Finding]:
        for pin in self.catalog.database.read(pins.dangling):
            yield Finding("pin-dangling", pin.owner, detail=f"number {pin.snapshot}")

    def _images(self) -> Iterator[Finding]:
        index = Index(self.snapshotter, self.content)
        for record in self.catalog.database.read(images.walk):
            try:
                image = index.get(record.name)
            except errors.NotFound:
                continue  # removed meanwhile
            except errors.OnlapError as error:
                yield Finding("image-damaged", record.name, detail=error.message)
                continue
            unpinned = self.catalog.database.read(lambda c: _unpinned(c, record, image.blobs))  # noqa: B023
            if unpinned:
                yield Finding("pin-missing", record.name, detail=unpinned[0])
            missing = [digest for digest, size in image.blobs.items() if not self.content.has(digest, size)]
            # The blobs of one that was removed or replaced meanwhile may be gone as well.
            if missing and self.catalog.database.read(lambda c: images.find(c, record.name)) == record:  # noqa: B023
                yield from (Finding("blob-missing", record.name, detail=digest) for digest in missing)


def _unpinned(connection: Connection, record: images.ImageRecord, blobs: Collection[str]) -> list[str]:
    """The blobs of an image that it does not pin; none of one that was removed or replaced meanwhile."""
    if images.find(connection, record.name) != record:
        return []
    owner = images.pin_owner(record.name)
    return [digest for digest in blobs if owner not in pins.holders(connection, digest=digest)]


def _without_record(names: list[str], known: set[int]) -> list[str]:
    return [name for name in sorted(names) if not (re.fullmatch("[0-9]+", name) and int(name) in known)]


def _integrity(connection: Connection) -> list[str]:
    try:
        said = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
        dangling = connection.execute("PRAGMA foreign_key_check").fetchall()
        said += [f"a row of {row[0]} refers to one of {row[2]} that is gone" for row in dangling]
    except sqlite3.DatabaseError as error:
        said = [str(error)]
    return [each for each in said if each != "ok"]


def _rows(connection: Connection) -> dict[int, Row]:
    return {row[0]: Row(*row[1:]) for row in connection.execute("SELECT id, name, kind, parent FROM snapshots")}


def chains(rows: dict[int, Row]) -> Iterator[Finding]:
    """What is wrong with the parents of snapshots, by id."""
    whole: set[int] = set()
    for start, row in rows.items():
        if row.parent is not None and row.parent not in rows:
            yield Finding("parent-missing", row.name)
        elif row.parent is not None and rows[row.parent].kind != COMMITTED:
            yield Finding("parent-not-committed", row.name)
        path: list[int] = []
        at: int | None = start
        while at is not None and at in rows and at not in whole:
            if at in path:
                if at == start:
                    yield Finding("parent-cycle", row.name)
                break
            path.append(at)
            at = rows[at].parent
        else:
            whole.update(path)
