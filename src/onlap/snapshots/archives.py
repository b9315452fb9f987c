"""Snapshots and archives: a layer applied to a snapshot, a snapshot written as a layer, layers made into one."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from onlap import errors
from onlap.catalog import records
from onlap.catalog.records import ACTIVE, Record
from onlap.errors import shown
from onlap.layers.apply.archive import Applied, Limits, apply
from onlap.layers.diff.changes import stack_items
from onlap.layers.diff.write import Encoding, Written, piped, write_layer
from onlap.progress import Callback, Reporter
from onlap.snapshots import exclusion
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.copy import Copied
from onlap.trees.transfer import import_directory
from onlap.trees.walk import OPEN_DIRECTORY

Source = BinaryIO | str | bytes | os.PathLike[str]


def apply_layer(
    snapshotter: RecordedSnapshotter,
    key: str,
    source: Source,
    *,
    digest: str | None = None,
    diff_id: str | None = None,
    limits: Limits | None = None,
    progress: Callback | None = None,
) -> Applied:
    """Write the archive of a layer into an active snapshot, straight into its directory.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is not active, or is mounted read-write.
        OnlapError: see :func:`onlap.layers.apply.archive.apply`.
    """
    record = snapshotter.record(key)
    if record.kind != ACTIVE:
        raise errors.FailedPrecondition(
            f"snapshot {shown(key)} is {record.kind}, and a layer is applied to an active one", key=key
        )
    tree, *lowers = snapshotter.layers(record)
    markers = snapshotter.markers if isinstance(snapshotter, OverlaySnapshotter) else None
    ancestors = snapshotter.ancestors(record)
    with ExitStack() as stack:
        stack.enter_context(exclusion.alone(snapshotter, record))
        stack.enter_context(snapshotter.catalog.hold([record.id, *ancestors]))
        stack.enter_context(snapshotter.translated("apply a layer to", key))
        fd = os.open(tree, OPEN_DIRECTORY)
        stack.callback(os.close, fd)
        return apply(
            source,
            fd,
            lowers=lowers,
            markers=markers,
            recorded=snapshotter.markers.recorded,
            digest=digest,
            diff_id=diff_id,
            limits=limits,
            progress=progress,
        )


def copy_in(
    snapshotter: RecordedSnapshotter,
    key: str,
    source: str,
    exclude: Collection[str] = (),
    *,
    allow_changes: bool = False,
    progress: Callback | None = None,
) -> Copied:
    """Copy a directory into an active snapshot, straight into its directory.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is mounted read-write, or a file changed while it was read.
        OnlapError: see :func:`onlap.trees.transfer.import_directory`.
    """
    report = Reporter(progress, "import", "files")
    record = snapshotter.record(key)
    with exclusion.alone(snapshotter, record):
        copied = import_directory(
            source,
            snapshotter.layers(record)[0],
            root=snapshotter.root,
            exclude=exclude,
            allow_changes=allow_changes,
            progress=lambda entries, _size: report(entries),
        )
    report.finish(copied.entries)
    return copied


def write_diff(
    snapshotter: RecordedSnapshotter,
    key: str,
    other: str | None,
    out: BinaryIO,
    encoding: Encoding,
    *,
    whole: bool = False,
    progress: Callback | None = None,
) -> Written:
    """Write what ``key`` changed against its parent as a layer; with ``other``: what makes ``other`` of ``key``.

    With ``whole`` it is the tree of ``key``, without whiteouts. Nothing is mounted.

    Raises:
        NotFound: there is no such snapshot.
        OnlapError: see :func:`onlap.layers.diff.write.write_layer`.
    """
    record = snapshotter.record(key)
    if other is None:
        one, two = None if whole else _parent(snapshotter, record), record
    else:
        one, two = record, snapshotter.record(other)
    sides = [each for each in (one, two) if each is not None]
    ids = {identifier for each in sides for identifier in (each.id, *snapshotter.ancestors(each))}
    doing = "export" if whole else "write the layer of"
    with snapshotter.catalog.hold(sorted(ids)), snapshotter.translated(doing, key):
        return write_layer(
            snapshotter.layers(one) if one is not None else [],
            snapshotter.layers(two),
            snapshotter.markers,
            out,
            encoding,
            since=snapshotter.since(one, two),
            progress=progress,
        )


def clamp_times(snapshotter: RecordedSnapshotter, record: Record, epoch: int) -> None:
    """Give what an active snapshot changed the times that its layer has, written with this epoch.

    Where directories are renamed (redirect_dir), a layer holds files of the snapshots below, too; those stay.

    Raises:
        OnlapError: a file refuses.
    """
    latest = epoch * 1_000_000_000
    parent = _parent(snapshotter, record)
    before, after = snapshotter.layers(parent) if parent is not None else [], snapshotter.layers(record)
    with (
        snapshotter.catalog.hold([record.id, *snapshotter.ancestors(record)]),
        snapshotter.translated("set the times of", record.name),
    ):
        since = snapshotter.since(parent, record)
        for change, _, found in stack_items(before, after, snapshotter.markers, since=since):
            if change.after is None or change.after.mtime_ns <= latest:
                continue
            if found is not None and found.layer == 0:
                times = (found.status.st_atime_ns, latest)
                os.utime(found.name, ns=times, dir_fd=found.dir_fd, follow_symlinks=False)
            elif change.path == ".":
                os.utime(after[0], ns=(os.stat(after[0]).st_atime_ns, latest))


def squash(snapshotter: RecordedSnapshotter, top: str, key: str, base: str | None) -> None:
    """Write the layers above ``base`` up to ``top`` into the active snapshot ``key``, which stands on ``base``.

    The layers are written as one archive into a pipe and applied from it: whiteouts come out right against what lies
    below, and nothing is mounted.

    Raises:
        NotFound: there is no such snapshot.
        InvalidArgument: ``top`` does not stand on ``base``.
        OnlapError: of another kind, for what the filesystem says.
    """
    record = snapshotter.record(top)
    before: Sequence[str] = []
    if base is not None:
        below = snapshotter.record(base)
        if below.id != record.id and below.id not in snapshotter.ancestors(record):
            raise errors.InvalidArgument(
                f"{shown(top)} does not stand on {shown(base)}", key=top, hint="see with: onlap tree"
            )
        before = snapshotter.layers(below)
    after = snapshotter.layers(record)
    held = snapshotter.catalog.hold([record.id, *snapshotter.ancestors(record)])
    # Copies (native) tell an edit that put size and time back only by content; overlays look anyhow.
    archive = piped(before, after, snapshotter.markers, Encoding(content=True, sparse=True))
    with held, snapshotter.translated("squash", top), archive as source:
        apply_layer(snapshotter, key, source)


def _parent(snapshotter: RecordedSnapshotter, record: Record) -> Record | None:
    """The snapshot that another began as."""
    parent_id = record.parent_id
    if parent_id is None:
        return None
    # By its id: its name may belong to another one by now, if both have been removed meanwhile.
    parent = snapshotter.catalog.database.read(lambda c: records.by_id(c, parent_id))
    if parent is None:
        raise records.not_found(record.name)
    return parent
