"""A directory as the lowest layer itself, and what has changed in a directory since it was captured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from onlap import errors
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.layers.paths import join
from onlap.snapshots import contexts
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.walk import Descent, open_on_mount, opened
from onlap.workspaces.capture.capture import read_fingerprint, write_fingerprint
from onlap.workspaces.capture.clock import await_tick, now_ns
from onlap.workspaces.capture.fingerprint import Directories, Fingerprint, Listed
from onlap.workspaces.capture.scan import Scanner


def link(snapshotter: RecordedSnapshotter, directory: str, name: str) -> Record:
    """A committed snapshot that shows a directory as it is at any moment, and knows how it looks now.

    Args:
        snapshotter: of the workspaces.
        directory: its real path.
        name: of the snapshot.

    Raises:
        Unimplemented: the root has native copies.
        InvalidArgument: the root lies in the directory, or the directory in the root.
        NotFound: there is no such directory.
        OnlapError: of another kind, for an error of the filesystem.
    """
    if not isinstance(snapshotter, OverlaySnapshotter):
        raise errors.Unimplemented("a native root has no layers that could be a directory of others", key=directory)
    # Overlapping layers: the kernel's behaviour is undefined (overlayfs.rst, "Sharing and copying layers").
    for inner, outer in ((snapshotter.root, directory), (directory, snapshotter.root)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise errors.InvalidArgument(
                f"the root {shown(snapshotter.root)} and {shown(directory)} lie in each other",
                key=directory,
                hint="use a root elsewhere",
            )
    with errors.translated("look at the directory", key=directory), opened(directory) as source:
        await_tick()  # otherwise what was written just before would count as changed
        fingerprint = Fingerprint(now_ns(), _survey(snapshotter, source, ()))
    with contexts.prepared(snapshotter, None, "live") as key:
        record = snapshotter.record(key)
        with errors.translated("make the snapshot", key=directory):
            os.symlink(directory, snapshotter.catalog.layout.live(record.id))
        write_fingerprint(snapshotter, record, fingerprint)
        snapshotter.commit(name, key)
    return snapshotter.record(name)


def changes(
    snapshotter: RecordedSnapshotter, record: Record, directory: str, exclude: Collection[str]
) -> Iterator[str]:
    """The paths in a directory that are not as they were when it was captured, by their stats.

    Args:
        snapshotter: of the workspaces.
        record: the capture.
        directory: its path.
        exclude: what was left out.

    Raises:
        DataLoss: what it looked like is lost.
        NotFound: there is no such directory any more.
        OnlapError: of another kind, for an error of the filesystem.
    """
    earlier = read_fingerprint(snapshotter, record)
    if earlier is None:
        raise errors.DataLoss(f"it is not known how {shown(directory)} looked", key=directory, hint="capture it again")
    with errors.translated("look at the directory", key=directory), opened(directory) as source:
        now = _survey(snapshotter, source, exclude)
    yield from sorted(_differences(earlier.directories, now), key=os.fsencode)


def _survey(snapshotter: RecordedSnapshotter, source: int, exclude: Collection[str]) -> Directories:
    """How all directories below an open one look; raises OSError."""
    root = os.stat(snapshotter.root)
    scanner = Scanner(exclude, (root.st_dev, root.st_ino))
    found: dict[str, Listed] = {}
    descent = Descent(source)
    with contextlib.closing(descent):
        stack = [("", iter(_look(scanner, source, "", found)))]
        while stack:
            prefix, names = stack[-1]
            for name in names:
                # A mount point, or what was moved away meanwhile, is missing below; then that is its difference.
                with contextlib.suppress(OSError):
                    child = open_on_mount(descent.fd, name)
                    descent.enter(child)
                    stack.append((f"{prefix}{name}/", iter(_look(scanner, child, f"{prefix}{name}/", found))))
                    break
            else:
                stack.pop()
                if stack:
                    descent.leave()
    return found


def _look(scanner: Scanner, fd: int, prefix: str, found: dict[str, Listed]) -> list[str]:
    scan = scanner.read(fd, prefix)
    found[prefix.rstrip("/")] = scan.listed
    return scan.below


def _differences(before: Directories, after: Directories) -> Iterator[str]:
    for path in before.keys() | after.keys():
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if old is None or new is None:
            yield path or "."
            continue
        if old.own != new.own:
            yield path or "."
        was, now = dict(old.each()), dict(new.each())
        for name in was.keys() | now.keys():
            if was.get(name) != now.get(name):
                yield join(path, name)
