"""Sidecars: beside each tree a copy of its record, from which a lost catalog can be rebuilt.

::

    ROOT/snapshots/<id>/about/record   JSON; its time of modification is the record's ``updated_ns``
    ROOT/content/images.json           the names of the images

They are written after a record has changed: in the background, when a root is closed, and by ``cleanup``. None of them
is needed as long as there is a catalog, so no caller waits for one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from sqlite3 import Connection
from typing import Any, NamedTuple

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.disk.staging import Staging
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.syscalls.files import OUR_FILE, is_directory, open_file

FORMAT = 1
# Settings that describe a moment, not the root.
_PASSING = ("epoch", "lost_up_to")
# Bytes; a record with 10,000 labels has less than one.
_LARGEST = 64 << 20
# How many a process writes when it closes the root; the rest is left to the next background work or cleanup.
_AT_CLOSE = 256


class Sidecar(NamedTuple):
    """What a sidecar says: all that the catalog knows of one snapshot, and of the root.

    Attributes:
        id: of the snapshot, as are ``owner`` to ``labels``; see :class:`~onlap.catalog.records.Record`.
        manifest: the digest of its manifest; None where it has none yet.
        settings: of the root: which snapshotter it is for, and its properties.
    """

    id: int
    owner: str
    name: str
    parent_id: int | None
    kind: str
    created_ns: int
    updated_ns: int
    empty: bool
    labels: Mapping[str, str]
    manifest: str | None
    settings: Mapping[str, str]


def read(path: str) -> Sidecar:
    """The sidecar at a path.

    Raises:
        NotFound: there is none.
        DataLoss: it is damaged.
        OnlapError: of another kind, for what the filesystem says.
    """
    return decode(_content(path, "read a sidecar"), path)


def _content(path: str, doing: str) -> bytes:
    with errors.translated(doing, key=path):
        try:
            with open_file(path) as file:
                return file.read(_LARGEST)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENOTDIR):
                return b""  # as damaged as can be
            raise


def decode(data: bytes, path: str) -> Sidecar:
    """What the content of a sidecar says.

    Raises:
        DataLoss: it is damaged.
    """
    try:
        sidecar = Sidecar(**_unsealed(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise errors.DataLoss(f"the record beside a tree is damaged: {shown(path)}", key=path) from error
    if not _is_valid(sidecar):
        raise errors.DataLoss(f"the record beside a tree is damaged: {shown(path)}", key=path)
    return sidecar


def read_images(path: str) -> list[dict[str, Any]]:
    """The names of the images, as the file at a path says; raises as :func:`read`."""
    data = _content(path, "read the names of the images")
    try:
        return [dict(each) for each in _unsealed(data)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise errors.DataLoss(f"the names of the images are damaged: {shown(path)}", key=path) from error


def encode(sidecar: Sidecar) -> bytes:
    """The content of a sidecar."""
    return _sealed(sidecar._asdict())


def _sealed(content: object) -> bytes:
    """A file: its content, with a digest of it, since a bit that changed in a number or a name shows nowhere else."""
    import json

    return json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}, indent=1).encode()


def _unsealed(data: bytes) -> Any:
    import json

    found = json.loads(data)
    if found["format"] != FORMAT or found["sha256"] != _digest(found["content"]):
        raise ValueError("another format, or damaged")
    return found["content"]


def _digest(content: object) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_valid(found: Sidecar) -> bool:
    if not (isinstance(found.labels, dict) and isinstance(found.settings, dict)):
        return False
    texts: list[object] = [found.owner, found.name, *found.labels, *found.labels.values()]
    texts += [*found.settings, *found.settings.values()]
    numbers: tuple[object, ...] = (found.id, found.created_ns, found.updated_ns)
    others: tuple[tuple[object, object], ...] = (
        (found.parent_id, int | None),
        (found.empty, bool),
        (found.manifest, str | None),
    )
    return (
        all(map(is_text, texts))
        and all(isinstance(number, int) and 0 <= number < 1 << 63 for number in numbers)
        and 0 < found.id < records.HIGHEST
        and all(isinstance(value, kind) for value, kind in others)  # type: ignore[arg-type]
        and found.kind in (records.ACTIVE, records.VIEW, records.COMMITTED)
    )


def is_text(value: object) -> bool:
    """Whether it is a string that a catalog can hold; JSON can have halves of a character (surrogates)."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


class Sidecars:
    """The sidecars of a root.

    Args:
        layout: of the root.
        staging: where they are written before they have their place.
        database: its records.
    """

    def __init__(self, layout: Layout, staging: Staging, database: Database) -> None:
        self.layout = layout
        self.staging = staging
        self.database = database
        self._unwritten: set[int] = set()
        # By id, the ``updated_ns`` and the manifest's digest that a sidecar has, until :meth:`clear_due` was called.
        self._written: dict[int, tuple[int, str | None]] = {}
        self._looked = False
        self._settings: dict[str, str] | None = None

    def changed(self, identifier: int) -> None:
        """Note that the record of a snapshot, or its manifest, is new or has changed."""
        self._unwritten.add(identifier)

    def removed(self, identifier: int) -> None:
        """Note that a snapshot was removed: most are, in a burst, before their turn comes."""
        self._unwritten.discard(identifier)
        self._written.pop(identifier, None)

    def write(self, stop: Callable[[], bool]) -> None:
        """Write all that are missing or old, those of other processes too, until ``stop`` says so.

        Raises:
            OnlapError: the catalog cannot be read.
        """
        if not self._looked:
            # Only once, for what other processes left: they write what they change later, or the next process does.
            self._unwritten.update(self._outdated(records.DUE))
            self._looked = True
        while not stop() and self._write_next():
            pass
        self._write_images()

    def write_all(self) -> None:
        """Write all that are missing or old, also those of other processes.

        Raises:
            OnlapError: the catalog cannot be read.
        """
        for identifier in self._outdated(None):
            self.write_one(identifier)
        self._write_images()
        self.clear_due()

    def clear_due(self) -> None:
        """Note in the catalog for which of the snapshots whose sidecars are written no background work is left.

        Raises:
            OnlapError: the catalog cannot be written.
        """
        written = [(identifier, *has) for identifier, has in list(self._written.items())]
        if not written:
            return
        # On a full or read-only disk they stay due, and the next process finds that nothing is left to do.
        with contextlib.suppress(errors.ResourceExhausted, errors.FailedPrecondition):
            self.database.write(lambda c: records.clear_due(c, written))
        for identifier, *_ in written:
            self._written.pop(identifier, None)

    def finish(self) -> None:
        """Write what this process has left to do, if that is not much. Call it when the background work has ended."""
        if 0 < len(self._unwritten) <= _AT_CLOSE:
            with contextlib.suppress(errors.OnlapError):
                while self._write_next():
                    pass
                self._write_images()

    def is_current(self, record: Record) -> bool:
        """Whether a snapshot's sidecar is there, and has the digest of its manifest; no more of it is checked."""
        return self._has(record, self._manifest(record))

    def is_there(self, record: Record) -> bool:
        """Whether a snapshot's sidecar is as new as its record, and not empty or zeroed; what it says is not checked.

        Nothing is synced here. Of one that was written just before a power cut there may be the name, the time and the
        length, and nothing in it, or zeroes.
        """
        return self._data(record) != b""

    def _has(self, record: Record, manifest: str | None) -> bool:
        # Without parsing it: in a name or label, the quotes would be escaped.
        return b'"manifest": ' + (f'"{manifest}"' if manifest else "null").encode() in self._data(record)

    def _data(self, record: Record) -> bytes:
        """The content of a sidecar that is there; else nothing."""
        try:
            fd = os.open(self.layout.record(record.id), OUR_FILE)
        except OSError:
            return b""
        try:
            status = os.fstat(fd)
            if status.st_mtime_ns != record.updated_ns:
                return b""
            data = os.pread(fd, min(status.st_size, _LARGEST), 0)
        except OSError:
            return b""
        finally:
            os.close(fd)
        return data if data[:1] + data[-1:] == b"{}" else b""

    def _manifest(self, record: Record) -> str | None:
        if record.kind != records.COMMITTED:
            return None
        return self.database.read(lambda c: records.manifest(c, record.id))

    def expected(self, record: Record) -> Sidecar:
        """What the sidecar of a record should say."""
        if self._settings is None:
            found = self.database.read(records.settings)
            self._settings = {key: value for key, value in found.items() if key not in _PASSING}
        return Sidecar(
            record.id,
            record.owner,
            record.name,
            record.parent_id,
            record.kind,
            record.created_ns,
            record.updated_ns,
            record.empty,
            record.labels,
            self._manifest(record),
            self._settings,
        )

    def _outdated(self, condition: records.Condition | None) -> Iterator[int]:
        for record in records.walk(self.database.read, condition=condition):
            manifest = self._manifest(record)
            if self._has(record, manifest):
                self._written[record.id] = (record.updated_ns, manifest)
            else:
                yield record.id

    def _write_next(self) -> bool:
        """Write one that is missing or old; returns whether there was one."""
        try:
            identifier = self._unwritten.pop()
        except KeyError:
            return False  # none, or the last one was removed meanwhile
        self.write_one(identifier)
        return True

    def write_one(self, identifier: int) -> None:
        """Write the sidecar of a snapshot, whatever is there; a failure is logged."""
        record = self.database.read(lambda c: records.by_id(c, identifier))
        if record is None:
            return
        sidecar = self.expected(record)
        if self._put(self.layout.record(identifier), encode(sidecar), record.updated_ns):
            self._written[identifier] = (record.updated_ns, sidecar.manifest)

    def _write_images(self) -> None:
        path = self.layout.images
        if not is_directory(os.path.dirname(path)):
            return
        columns, rows = self.database.read(_images)
        if not rows:
            with contextlib.suppress(OSError):
                os.unlink(path)
            return
        data = _sealed([dict(zip(columns, row, strict=True)) for row in rows])
        try:
            with open_file(path) as file:
                if file.read() == data:
                    return
        except OSError:
            pass  # there is none yet, or it is to be made anew
        self._put(path, data, None)

    def _put(self, path: str, data: bytes, time_ns: int | None) -> bool:
        """Write a file; whether that succeeded, else the log says why."""
        try:
            with self.staging.file(path) as file:
                file.write(data)
                file.flush()
                if time_ns is not None:
                    os.utime(file.fileno(), ns=(time_ns, time_ns))
        except FileNotFoundError:
            pass  # the snapshot was removed meanwhile
        except OSError as error:
            # Nothing is lost: the catalog is there, and check reports what is missing. A disk that is full or read-only
            # need not be reported by every command.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                warn(f"cannot write {shown(path)}: {error}")
        else:
            return True
        return False


def _images(connection: Connection) -> tuple[list[str], list[tuple[Any, ...]]]:
    cursor = connection.execute("SELECT * FROM images ORDER BY name")
    return [column[0] for column in cursor.description], cursor.fetchall()
