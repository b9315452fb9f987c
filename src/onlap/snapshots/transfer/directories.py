"""Directories in and out: a directory copied into a snapshot, and the tree of a snapshot copied into a directory."""

from __future__ import annotations

import os
from collections.abc import Collection

from onlap import errors
from onlap.catalog.runs import noting_partials
from onlap.errors import shown
from onlap.mounts.temporary import may_detach
from onlap.progress import Callback, Reporter
from onlap.snapshots import exclusion
from onlap.snapshots.contexts import mounted_snapshot
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees import atomic
from onlap.trees.copy import Copied, Copier, copy_tree


def copy_in(
    snapshotter: RecordedSnapshotter,
    key: str,
    source: str,
    exclude: Collection[str] = (),
    *,
    allow_changes: bool = False,
    progress: Callback | None = None,
) -> Copied:
    """Copy a directory into the directory of an active snapshot.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: it is mounted read-write, or a file changed while it was read.
        InvalidArgument, OnlapError: see :meth:`Store.import_`.
    """
    report = Reporter(progress, "import", "files")
    record = snapshotter.record(key)
    doing = f"import {shown(source)}"
    with exclusion.changing(snapshotter, record):
        with errors.translated(doing, key=source):
            real, root = os.path.realpath(source), os.path.realpath(snapshotter.root)
            status = os.stat(root)
        if real == root or real.startswith(root + "/"):
            raise errors.InvalidArgument(
                f"{shown(source)} lies inside the root {shown(snapshotter.root)}",
                key=source,
                hint="import something else",
            )
        copier = Copier(
            exclude=exclude,
            allow_changes=allow_changes,
            avoid=[(status.st_dev, status.st_ino)],
            merge=True,
            progress=lambda entries, _size: report(entries),
        )
        # A symlink is followed: the caller means its target.
        with errors.translated(doing, key=source):
            copied = copy_tree(source, snapshotter.layers(record)[0], copier, follow=True)
    report.finish(copied.entries)
    return copied


def copy_out(snapshotter: RecordedSnapshotter, key: str, directory: str, *, progress: Callback | None = None) -> Copied:
    """Copy the whole tree of a snapshot of any kind into a new or empty directory, completely or not at all.

    Raises:
        NotFound: there is no such snapshot.
        FailedPrecondition: the directory is not empty.
        InvalidArgument: it lies inside the root.
        OnlapError: see :meth:`Store.export`.
    """
    check_outside(snapshotter, directory)
    report = Reporter(progress, "export", "files")
    doing = f"export to {shown(directory)}"
    # An interrupt may leave a descriptor open, which would keep a mount at a path busy.
    mounted = mounted_snapshot(snapshotter, key, detached=may_detach(), reading=True)
    with (
        mounted as tree,
        noting_partials(snapshotter.catalog) as note,
        errors.translated(doing, key=directory),
        atomic.new_directory(directory, note) as target,
    ):
        # It may lie in the tree, which would otherwise be copied into itself without end.
        status = os.stat(target)
        copier = Copier(
            # The tree may be in use and cannot be frozen: changing files are copied as they are read.
            allow_changes=True,
            avoid=[(status.st_dev, status.st_ino)],
            progress=lambda entries, _size: report(entries),
        )
        with errors.translated(doing, key=os.fspath(tree)):
            copied = copy_tree(os.fspath(tree), target, copier, follow=True)
    report.finish(copied.entries)
    return copied


def check_outside(snapshotter: RecordedSnapshotter, path: str) -> None:
    """Raise InvalidArgument for a path among the root's own files; what is mounted in it may be written to."""
    place = os.path.realpath(path)
    root = snapshotter.root
    if place.startswith(f"{root}/") and not place.startswith(f"{root}/runs/"):
        raise errors.InvalidArgument(
            f"{shown(path)} lies inside the root {shown(root)}", key=path, hint="write to another directory"
        )
