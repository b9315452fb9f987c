"""Whether what was committed is still there, bit for bit: files against manifests, blobs against digests."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator

from onlap import errors
from onlap.arguments import check_text
from onlap.catalog.records import COMMITTED, Condition, Record
from onlap.check.findings import Finding
from onlap.check.meter import Meter
from onlap.content.store import ContentStore
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.syscalls.files import is_directory, is_file
from onlap.trees import manifest
from onlap.trees.manifest import Deviation
from onlap.trees.walk import opened

_BLOB = "blob:"
_SNAPSHOT = "snapshot:"


class Content:
    """The content of a root.

    Args:
        snapshotter: of the root.
        content: of the root.
        after: where an earlier check stopped.
        meter: for what is read; once it is over, the check stops behind the snapshot or blob that it is at.

    Attributes:
        blobs: how many were read.
        unlisted: committed snapshots without a manifest.
        after: where it stopped; None when it came to its end.

    Raises:
        InvalidArgument: ``after`` is not what an earlier check gave.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        *,
        after: str | None,
        meter: Meter,
    ) -> None:
        self.snapshotter = snapshotter
        self.content = content
        self._last_snapshot, self._last_blob = _parse(after)
        self.meter = meter
        self.blobs = self.unlisted = 0
        self.after: str | None = None

    def findings(self) -> Iterator[Finding]:
        """All that is not what it was.

        Raises:
            OnlapError: the catalog cannot be read.
        """
        is_over = False
        if not self._last_blob:
            is_over = yield from self._snapshots()
        if not is_over:
            yield from self._blobs()
        self.meter.finish()

    def _is_over(self, done: str) -> bool:
        # Asked behind each snapshot and blob, and never inside one: so that every call gets further.
        if not self.meter.is_over():
            return False
        self.after = done
        return True

    def _snapshots(self) -> Generator[Finding, None, bool]:
        """Yields what it finds; returns whether the time is up."""
        catalog = self.snapshotter.catalog
        later = Condition("s.kind = ? AND s.id > ?", (COMMITTED, self._last_snapshot))
        for record in catalog.walk(None, later):
            yield from self._snapshot(record)
            if self._is_over(f"{_SNAPSHOT}{record.id}"):
                return True
        return False

    def _snapshot(self, record: Record) -> Iterator[Finding]:
        catalog = self.snapshotter.catalog
        if record.empty:
            return
        try:
            with catalog.hold([record.id]):
                listed = catalog.manifests.entries(record)
                if listed is None:
                    self.unlisted += 1
                    return
                failures: dict[str, OSError] = {}
                with opened(catalog.layout.tree(record.id)) as top:
                    for deviation in manifest.deviations(listed, top, self.meter, failures.__setitem__):
                        yield finding_of(record, deviation, failures.get(deviation.path))
        except errors.NotFound:
            return  # removed meanwhile
        except (errors.Unavailable, errors.ResourceExhausted):
            raise
        except errors.OnlapError:
            # Of a tree that is gone the structure tells, as of a manifest that is.
            if is_file(catalog.layout.manifest(record.id)) and is_directory(catalog.layout.tree(record.id)):
                yield Finding("manifest-damaged", record.name)
        except OSError as error:
            if error.errno == errno.ENOENT and not is_directory(catalog.layout.tree(record.id)):
                return  # removed meanwhile; or the structure tells of it
            name = error.filename if isinstance(error.filename, str) else None
            yield Finding("file-unreadable", record.name, name, detail=error.strerror or str(error))

    def _blobs(self) -> Iterator[Finding]:
        for blob in self.content.walk():
            if blob.digest <= self._last_blob:
                continue
            self.blobs += 1
            try:
                whole = self.content.is_whole(blob.digest, self.meter)
            except errors.OnlapError as error:
                yield Finding("blob-damaged", blob.digest, detail=error.message)
            else:
                if not whole and self.content.has(blob.digest):
                    yield Finding("blob-damaged", blob.digest)
            if self._is_over(f"{_BLOB}{blob.digest}"):
                return


def finding_of(record: Record, deviation: Deviation, failure: OSError | None) -> Finding:
    """What a deviation of a committed snapshot is; ``failure``: why the file could not be read."""
    return as_finding(record.name, deviation, failure)


def as_finding(name: str, deviation: Deviation, failure: OSError | None, users: tuple[str, ...] = ()) -> Finding:
    """What a deviation of a committed layer is.

    Args:
        name: the layer's.
        deviation: of its tree.
        failure: why the file could not be read.
        users: see :class:`~onlap.check.findings.Finding`.
    """
    path = deviation.path or "."
    if failure is not None:
        return Finding("file-unreadable", name, path, failure.strerror or str(failure), users)
    if deviation.expected is None:
        return Finding("file-unknown", name, path, users=users)
    if not deviation.found:
        return Finding("file-missing", name, path, users=users)
    return Finding("file-changed", name, path, ", ".join(sorted(deviation.what)), users)


def _parse(after: str | None) -> tuple[int, str]:
    """The last snapshot and the last blob that an earlier check looked at."""
    if after is None:
        return 0, ""
    check_text(after, "place to continue after")
    if after.startswith(_BLOB):
        return 0, after.removeprefix(_BLOB)
    number = after.removeprefix(_SNAPSHOT)
    if after == number or not (number.isascii() and number.isdigit() and len(number) < 19):
        raise errors.InvalidArgument(
            f"a check does not go on after {errors.shown(after)}", hint="give what an earlier one said"
        )
    return int(number), ""
