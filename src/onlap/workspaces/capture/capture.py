"""A directory as a committed snapshot, consistent, and onto an earlier capture of it.

::

    ROOT/snapshots/<id>/about/captured   see onlap.workspaces.capture.fingerprint
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

from onlap import errors
from onlap.arguments import StrPath, check_number, check_path
from onlap.boundary import public
from onlap.catalog.records import COMMITTED, Record, not_found
from onlap.errors import shown
from onlap.progress import Callback, Reporter
from onlap.snapshots import contexts, exclusion
from onlap.snapshots.contract import Info, check_labels
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.syscalls.files import exists, open_file
from onlap.trees.copy import Copier
from onlap.trees.walk import OPEN_DIRECTORY, opened
from onlap.workspaces.capture.clock import now_ns
from onlap.workspaces.capture.fingerprint import Directories, Fingerprint, decode, encode
from onlap.workspaces.capture.layer import Layer
from onlap.workspaces.capture.passes import Passes
from onlap.workspaces.capture.scan import Scanner
from onlap.workspaces.capture.work_trees import refresh_indexes

# Seconds for which a directory may go on changing after it was copied.
PATIENCE = 30.0
# The longest chain of captures that are reused. OverlayFS looks a name up in every layer that has its
# directory, and takes no more than 500; workspaces stand on these.
MOST_LAYERS = 16


class Captured(NamedTuple):
    """What a capture did.

    Attributes:
        record: the committed snapshot.
        written: number of files copied or removed, and of directories made, in its layer.
        skipped: how many entries of each kind could not be kept, as ``{"socket": 1}``; see
            :class:`onlap.trees.copy.Copied`. Of a kind that is not copied again, those below are not counted.
    """

    record: Record
    written: int
    skipped: Mapping[str, int]


@public
def capture(
    snapshotter: RecordedSnapshotter,
    directory: StrPath,
    name: str,
    *,
    onto: str | None = None,
    labels: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
    patience: float = PATIENCE,
    progress: Callback | None = None,
) -> Info:
    """Capture a directory as a committed snapshot, as it was at one moment, while others may write to it.

    It is kept as :meth:`onlap.store.Store.import_` keeps it. Sockets, and what is mounted in it, are left out, as are
    this root and the directories of merges that are under way. With ``onto``, a walk of stats finds what has changed
    since, and only that is read, and written as a layer on top. The index of a work tree of git is adapted to the
    copies, so that the first ``git status`` in a fork reads no more files than in the original.

    A file that changes while it is read is read again, until a walk of stats finds that nothing has changed. What a
    program writes through a mapping (mmap) that it has written to before is seen only once the kernel has written
    it back.

    Args:
        snapshotter: of the root; its owner is that of the snapshots.
        directory: its path; a symlink is followed.
        name: the name of the snapshot.
        onto: an earlier capture, mostly of the same directory, which becomes the parent. If what it knows of the
            directory is damaged, all of it is captured, without a parent.
        exclude: :mod:`fnmatch` patterns, matched against the path from the top and against the last name.
        labels: of the snapshot.
        patience: for how many seconds after the first reading the directory may go on changing.
        progress: called with the number of entries seen, at most ten times per second.

    Raises:
        NotFound: there is no such directory, or no such earlier capture.
        InvalidArgument: it lies inside the root, or ``onto`` is not a capture.
        AlreadyExists: the name is taken.
        FailedPrecondition: it does not come to rest; the error names a path that kept changing.
        PermissionDenied: a file cannot be read; the error names it.
        OnlapError: of another kind, for an error of the filesystem.
    """
    last = None
    if onto is not None:
        last = snapshotter.record(onto)
        if last.kind != COMMITTED or not exists(snapshotter.catalog.layout.captured(last.id)):
            raise errors.InvalidArgument(
                f"snapshot {shown(onto)} is not a capture", key=onto, hint="capture without onto, or onto a capture"
            )
    take(snapshotter, directory, last, name, labels=labels, exclude=exclude, patience=patience, progress=progress)
    return snapshotter.stat(name)


def take(
    snapshotter: RecordedSnapshotter,
    directory: StrPath,
    last: Record | None,
    name: str,
    *,
    labels: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
    patience: float = PATIENCE,
    progress: Callback | None = None,
    reuse: bool = False,
) -> Captured:
    """Capture a directory, as :func:`capture` does.

    Args:
        snapshotter: of the root; its owner is that of the snapshots.
        directory: its path.
        last: an earlier capture; None if there is none. If it has no usable fingerprint, all of the directory is
            captured, without a parent.
        name: of the new capture.
        labels: of it.
        exclude: what is left out.
        patience: see :meth:`Passes.run`.
        progress: called with reports.
        reuse: if nothing has changed, make no snapshot: the result is ``last``. The parent of a new one is ``last``,
            or the first of the captures below, so that chains do not grow without end.

    Raises:
        OnlapError: see :func:`capture`.
    """
    path = check_path(directory, "directory to capture")
    check_labels(labels or {})
    check_number(patience, "patience")
    snapshotter.check_free(name)
    report = Reporter(progress, "capture", "files")
    doing = f"capture {shown(path)}"
    with errors.translated(doing, key=path):
        root = os.stat(snapshotter.root)
        real = os.path.realpath(path)
    if f"{real}/".startswith(f"{os.path.realpath(snapshotter.root)}/"):
        raise errors.InvalidArgument(
            f"{shown(path)} lies inside the root {shown(snapshotter.root)}", key=path, hint="capture something else"
        )
    scanner = Scanner(exclude, (root.st_dev, root.st_ino))
    parent, earlier = _usable(snapshotter, last)
    with contextlib.ExitStack() as stack:
        # A symlink is followed: the caller means its target.
        with errors.translated(doing, key=path):
            source = stack.enter_context(opened(path, OPEN_DIRECTORY & ~os.O_NOFOLLOW))
        reliable = _reliable(earlier, source)
        ancestors = snapshotter.ancestors(parent) if reuse and parent is not None else ()
        if len(ancestors) + 1 >= MOST_LAYERS:
            with errors.translated(doing, key=path):
                differs = _differs(source, scanner, reliable, patience)
            if differs:
                # What has changed since the oldest one is copied, so that the chain begins anew.
                parent, earlier = _usable(snapshotter, snapshotter.catalog.by_id(ancestors[-1]))
                reliable = _reliable(earlier, source)
        writing = _Writing(snapshotter, parent, stack)
        copier = Copier(allow_changes=True)
        layer = Layer(writing.begin, copier, whiteouts=isinstance(snapshotter, OverlaySnapshotter))
        below: Directories = earlier.directories if earlier is not None else {}
        passes = Passes(source, layer, scanner, below, reliable, report)
        taken_ns = now_ns()
        with errors.translated(doing, key=path), writing.locks:
            passes.run(patience)
            report.finish(passes.entries)
            if not layer.begun:
                if reuse and last is not None:
                    return Captured(last, 0, dict(scanner.skipped))
                layer.begin()
            if isinstance(snapshotter, OverlaySnapshotter):  # from a native snapshot, each fork has copies of its own
                refresh_indexes(snapshotter.layers(writing.record), snapshotter.markers, passes.known)
            write_fingerprint(snapshotter, writing.record, Fingerprint(taken_ns, passes.known))
        snapshotter.commit(name, writing.record.name, labels)
        skipped = copier.skipped
        for kind, count in scanner.skipped.items():
            skipped[kind] = skipped.get(kind, 0) + count
        return Captured(snapshotter.record(name), layer.entries, skipped)


class _Differs(Exception):
    """Something would have to be written."""


def _differs(source: int, scanner: Scanner, known: Directories, patience: float) -> bool:
    """Whether a directory is not as it was; raises as :meth:`Passes.run`."""

    def begin() -> int:
        raise _Differs

    layer = Layer(begin, Copier(), whiteouts=False)
    try:
        Passes(source, layer, scanner, known, known, lambda _entries: None).run(patience)
    except _Differs:
        return True
    return False


class _Writing:
    """The snapshot that is written, once something is to be written.

    Args:
        snapshotter: of the root.
        parent: the earlier capture.
        stack: removes the snapshot at the end, unless it was committed.

    Attributes:
        locks: keeps others from the tree meanwhile.
        record: of the snapshot, once it has begun.
    """

    record: Record

    def __init__(self, snapshotter: RecordedSnapshotter, parent: Record | None, stack: contextlib.ExitStack) -> None:
        self._snapshotter = snapshotter
        self._parent = parent
        self._stack = stack
        self.locks = contextlib.ExitStack()

    def begin(self) -> int:
        """Make the snapshot; returns a descriptor of its tree."""
        parent = self._parent
        name = parent.name if parent is not None else None
        key = self._stack.enter_context(contexts.prepared(self._snapshotter, name, "capture"))
        self.record = self._snapshotter.record(key)
        if parent is not None and self.record.parent_id != parent.id:
            raise not_found(parent.name)  # another has its name by now
        self.locks.enter_context(exclusion.changing(self._snapshotter, self.record))
        return self.locks.enter_context(opened(self._snapshotter.layers(self.record)[0]))


def _usable(snapshotter: RecordedSnapshotter, last: Record | None) -> tuple[Record | None, Fingerprint | None]:
    """An earlier capture and its fingerprint; neither if that is missing or damaged."""
    earlier = read_fingerprint(snapshotter, last) if last is not None else None
    return (last if earlier is not None else None), earlier


def _reliable(earlier: Fingerprint | None, source: int) -> Directories:
    """What an earlier fingerprint says about a directory now."""
    if earlier is None or earlier.taken_ns > now_ns() or not earlier.is_of(os.fstat(source).st_dev):
        return {}
    return earlier.directories


def read_fingerprint(snapshotter: RecordedSnapshotter, record: Record) -> Fingerprint | None:
    """What a captured directory looked like; None if the snapshot is no capture, or its fingerprint is damaged.

    Raises:
        OnlapError: it cannot be read.
    """
    path = snapshotter.catalog.layout.captured(record.id)
    with errors.translated("read what was captured", key=record.name):
        try:
            with open_file(path) as file:
                return decode(file.read())
        except (FileNotFoundError, IsADirectoryError):
            return None


def write_fingerprint(snapshotter: RecordedSnapshotter, record: Record, fingerprint: Fingerprint) -> None:
    """Note beside an active snapshot what the captured directory looked like; raises OSError."""
    catalog = snapshotter.catalog
    with catalog.staging.file(catalog.layout.captured(record.id)) as file:
        file.writelines(encode(fingerprint, now_ns()))
        file.flush()
        if snapshotter.syncs:
            # The commit of an empty layer syncs nothing.
            os.fsync(file.fileno())
    if snapshotter.syncs:
        with opened(os.path.dirname(catalog.layout.captured(record.id))) as about:
            os.fsync(about)
