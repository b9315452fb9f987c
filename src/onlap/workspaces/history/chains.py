"""How a workspace's layers follow each other: checkpoint, rollback and fork, each in one transaction.

A checkpoint commits the writable layer and puts another on it. So that a mount has only some layers however many
checkpoints there are, every sixth merges the last six, every 36th the last 36, and so on: the checkpoint's snapshot is
then one layer that stands for all of them, and its parent is what lies below. The files in it are hard links of theirs
(:mod:`onlap.layers.merge`), so that each file is linked once per level, and never copied.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from sqlite3 import Connection

from onlap import cancellation, errors
from onlap.catalog import records as rows
from onlap.catalog.catalog import New
from onlap.catalog.disk.boot import boot_id
from onlap.catalog.records import ACTIVE, COMMITTED, Record
from onlap.layers.merge import merge_layers
from onlap.snapshots import exclusion
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.copy import Copier, copy_tree
from onlap.trees.usage import usage
from onlap.trees.walk import opened
from onlap.workspaces.history.naming import check_unused
from onlap.workspaces.records import (
    AT,
    BASE_ID,
    CHANGED,
    COMMAND,
    FORGOTTEN,
    LEVEL,
    OWNER,
    UNSYNCED,
    names_in,
    next_labels,
    node_id,
    node_labels,
    node_name,
)

# With n checkpoints, at most 5 layers per digit of n in base 6: 25 layers for 7,775 checkpoints, 30 for 46,655.
# OverlayFS looks a name up in every layer that has its directory.
_BASE = 6


def advance(snapshotter: RecordedSnapshotter, top: Record, names: Mapping[str, str] | None = None) -> Record:
    """Commit the top of a workspace as a checkpoint, and put a new top on it.

    The content of the checkpoint has not reached the disk when this returns: its label :data:`UNSYNCED` says so.

    Args:
        snapshotter: of the workspaces.
        top: it must have changes, and not be mounted.
        names: labels that give the checkpoint names.

    Returns:
        The snapshot of the checkpoint.

    Raises:
        Busy: the top is in use.
        NotFound: it is gone or has been committed meanwhile.
        OnlapError: an error of the filesystem.
    """
    identifier = os.urandom(6).hex()
    with exclusion.changing(snapshotter, top) as top:
        node = {**node_labels(top.labels), **(names or {}), UNSYNCED: boot_id()}
        labels = next_labels(top.labels, identifier)
        merged = _absorbed(snapshotter, top)
        if not merged:
            return _commit(snapshotter, top, identifier, node, labels)
        with snapshotter.translated("commit snapshot", top.name):
            size = usage(snapshotter.catalog.layout.tree(top.id))
        node |= {LEVEL: str(_level(merged[-1]) + 1), CHANGED: f"{size.inodes} {size.size}"}
        return _merge(snapshotter, top, merged, identifier, node, labels)


def _commit(
    snapshotter: RecordedSnapshotter, top: Record, identifier: str, node: Mapping[str, str], labels: Mapping[str, str]
) -> Record:
    catalog = snapshotter.catalog
    with snapshotter.staged(top.name, ACTIVE, top, labels) as staged:

        def operation(connection: Connection) -> list[Record]:
            check_unused(connection, _current(connection, top), names_in(node, node))
            committed = rows.make_committed(connection, top, node_name(identifier), top.parent_id, node, False)
            if not committed:
                raise rows.not_found(top.name)
            below = rows.get(connection, OWNER, node_name(identifier))
            return [below, catalog.insert(connection, OWNER, New(top.name, ACTIVE, below, labels, staged))]

        return catalog.change(operation)[0]


def _absorbed(snapshotter: RecordedSnapshotter, top: Record) -> list[Record]:
    """The checkpoints below a top that its checkpoint is to be merged with, uppermost first."""
    if not isinstance(snapshotter, OverlaySnapshotter) or snapshotter.properties.redirect_dir:
        return []  # a copy has no layers below; and redirects lead from one layer into another

    def query(connection: Connection) -> list[Record]:
        found: list[Record] = []
        level = 0
        while len(alike := _alike(connection, found[-1] if found else top, level)) == _BASE - 1:
            found += alike
            level += 1
        return found

    return snapshotter.catalog.database.read(query)


def _alike(connection: Connection, above: Record, level: int) -> list[Record]:
    """The next checkpoints below that have a level, as many as are merged at most."""
    found: list[Record] = []
    record = above
    while len(found) < _BASE - 1:
        below = rows.by_id(connection, record.parent_id) if record.parent_id is not None else None
        if below is None or node_id(below) == BASE_ID or _level(below) != level:
            break
        found.append(below)
        record = below
    return found


def _level(record: Record) -> int:
    return int(record.labels.get(LEVEL, "0"))


def _merge(
    snapshotter: RecordedSnapshotter,
    top: Record,
    merged: Sequence[Record],
    identifier: str,
    node: Mapping[str, str],
    labels: Mapping[str, str],
) -> Record:
    """Make the checkpoint of a top, as one layer with those below it."""
    catalog = snapshotter.catalog
    below = snapshotter.parent(merged[-1])
    ids = [top.id, *(record.id for record in merged)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(catalog.hold(ids))
        # Without a parent: whose xattrs the top would have, also those that were removed since.
        layer = stack.enter_context(snapshotter.staged(node_name(identifier), COMMITTED, None, {}))
        with snapshotter.translated("merge the layers of", top.name), opened(f"{layer}/fs") as target:
            merge_layers([catalog.layout.tree(each) for each in ids], target, snapshotter.markers)
        staged = stack.enter_context(snapshotter.staged(top.name, ACTIVE, top, labels))

        def operation(connection: Connection) -> list[Record]:
            check_unused(connection, _current(connection, top), names_in(node, node))
            rows.check_kept(connection, top)
            _delete(connection, top)
            new = catalog.insert(connection, OWNER, New(node_name(identifier), COMMITTED, below, node, layer))
            return [new, catalog.insert(connection, OWNER, New(top.name, ACTIVE, new, labels, staged))]

        return catalog.change(operation, removed=[top])[0]


def copy(
    snapshotter: RecordedSnapshotter, top: Record, names: Mapping[str, str], all_frozen: Callable[[], bool]
) -> Record | None:
    """Make a checkpoint of a copy of the top's layer, while the programs that have it mounted are frozen.

    Args:
        snapshotter: of the workspaces.
        top: it keeps what it has, on the same snapshot as before.
        names: labels that give the checkpoint names.
        all_frozen: tells afterwards whether nobody can have written meanwhile.

    Returns:
        The snapshot of the checkpoint; None if somebody has.

    Raises:
        FailedPrecondition: a file changed while it was copied.
        NotFound: the top is gone or has been committed meanwhile.
        OnlapError: an error of the filesystem.
    """
    catalog = snapshotter.catalog
    identifier = os.urandom(6).hex()
    node = {**node_labels(top.labels), **names, UNSYNCED: boot_id()}
    below = snapshotter.parent(top)
    with snapshotter.staged(node_name(identifier), COMMITTED, below, {}) as staged:
        copy_tree(catalog.layout.tree(top.id), f"{staged}/fs", Copier(keep_markers=True))
        if not all_frozen():
            catalog.staging.discard(staged)
            return None

        def operation(connection: Connection) -> list[Record]:
            check_unused(connection, _current(connection, top), names_in(node, node))
            rows.check_kept(connection, top)
            new = catalog.insert(connection, OWNER, New(node_name(identifier), COMMITTED, below, node, staged))
            rows.set_labels(connection, top.id, {AT: identifier, COMMAND: None})
            return [new, top]

        return catalog.change(operation)[0]


def reset(snapshotter: RecordedSnapshotter, top: Record, onto: Record) -> Record:
    """Replace the top of a workspace by a new one on another snapshot; what was written to it is discarded.

    Args:
        snapshotter: of the workspaces.
        top: it must not be mounted.
        onto: the snapshot of a checkpoint, or a base.

    Raises:
        Busy: the top is in use.
        NotFound: it, or the checkpoint, is gone.
        OnlapError: an error of the filesystem.
    """
    # It is how space is freed in a workspace, so it has to work on a full disk.
    return snapshotter.catalog.garbage.with_space(lambda: _reset(snapshotter, top, onto))


def _reset(snapshotter: RecordedSnapshotter, top: Record, onto: Record) -> Record:
    catalog = snapshotter.catalog
    with exclusion.removing(snapshotter, top), snapshotter.staged(top.name, ACTIVE, onto, top.labels) as staged:

        def operation(connection: Connection) -> list[Record]:
            labels = next_labels(_delete(connection, top), node_id(onto))
            _check_not_forgotten(connection, onto)
            return [catalog.insert(connection, OWNER, New(top.name, ACTIVE, onto, labels, staged))]

        return catalog.change(operation, removed=[top])[0]


def start(
    snapshotter: RecordedSnapshotter, keys: Sequence[str], onto: Record, labels: Sequence[Mapping[str, str]]
) -> list[Record]:
    """Make the tops of new workspaces on a snapshot.

    Args:
        snapshotter: of the workspaces.
        keys: of the tops.
        onto: the snapshot of a checkpoint, or a base.
        labels: of each.

    Raises:
        AlreadyExists: there is such a workspace already.
        NotFound: the snapshot is gone.
        OnlapError: an error of the filesystem.
    """
    catalog = snapshotter.catalog
    with contextlib.ExitStack() as stack:
        staged = [
            stack.enter_context(snapshotter.staged(key, ACTIVE, onto, each))
            for key, each in zip(keys, labels, strict=True)
        ]

        def operation(connection: Connection) -> list[Record]:
            _check_not_forgotten(connection, onto)
            new = zip(keys, labels, staged, strict=True)
            return [catalog.insert(connection, OWNER, New(key, ACTIVE, onto, each, place)) for key, each, place in new]

        made = catalog.change(operation)
    cancellation.made(lambda: _withdraw(snapshotter, made))
    return made


def _withdraw(snapshotter: RecordedSnapshotter, tops: Sequence[Record]) -> None:
    for top in tops:
        with contextlib.suppress(errors.NotFound):
            snapshotter.remove(top.name)


def _check_not_forgotten(connection: Connection, onto: Record) -> None:
    """NotFound if a checkpoint has been forgotten since it was looked up."""
    now = rows.by_id(connection, onto.id)
    if now is None or FORGOTTEN in now.labels:
        raise rows.not_found(onto.name)


def _current(connection: Connection, top: Record) -> Record:
    """The record of a top as it is now; NotFound if it has been replaced, committed or removed."""
    now = rows.by_id(connection, top.id)
    if now is None or now.name != top.name or now.kind != top.kind:
        raise rows.not_found(top.name)
    return now


def _delete(connection: Connection, top: Record) -> Mapping[str, str]:
    """Delete the record of a top; returns the labels that it had."""
    labels = _current(connection, top).labels
    rows.delete(connection, top.id)
    return labels
