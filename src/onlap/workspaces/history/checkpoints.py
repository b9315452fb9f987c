"""The checkpoints of all workspaces of a root: listed, forgotten, and removed when nobody needs them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records as rows
from onlap.catalog.records import HAS_LABEL, Condition, Record
from onlap.errors import shown
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.workspaces.records import (
    AT,
    BASE,
    BASE_ID,
    CHANGED,
    DIRECTORY,
    FORGOTTEN,
    LINE,
    OWNER,
    UNSYNCED,
    WORKSPACE,
    Checkpoint,
    base_names_in,
    is_capture,
    is_node,
    is_top,
    name_label,
    names_in,
    node_id,
    node_name,
    parse_command,
    top_key,
    workspace_of,
)

# How long a capture is kept for the next workspace of its directory.
_KEEP_CAPTURE_NS = 7 * 24 * 3600 * 10**9


def base_of(snapshotter: RecordedSnapshotter, record: Record) -> Record:
    """The snapshot that the workspace of a top or a checkpoint was made from.

    Raises:
        DataLoss: its record is gone.
    """
    base = snapshotter.catalog.by_id(int(record.labels[BASE]))
    if base is None:
        raise errors.DataLoss(f"the base of {shown(record.name)} is gone", key=record.name)
    return base


def below(snapshotter: RecordedSnapshotter, top: Record) -> Record:
    """The snapshot of the checkpoint that a workspace stands on.

    Raises:
        NotFound: it is gone.
    """
    at = top.labels[AT]
    return base_of(snapshotter, top) if at == BASE_ID else snapshotter.record(node_name(at))


def describe(record: Record, top: Record) -> Checkpoint:
    """A checkpoint as callers see it, with the names that the workspace of a top gave it."""
    inodes, size = record.inodes, record.size
    if CHANGED in record.labels:
        inodes, size = map(int, record.labels[CHANGED].split())
    if node_id(record) == BASE_ID:
        names = base_names_in(top.labels)
        return Checkpoint(BASE_ID, names, None, "", record.created_ns, (), inodes, size, durable=True)
    return Checkpoint(
        node_id(record),
        names_in(record.labels, top.labels),
        record.labels[AT],
        record.labels[WORKSPACE],
        record.created_ns,
        parse_command(record.labels),
        inodes,
        size,
        durable=UNSYNCED not in record.labels,
    )


def measured(snapshotter: RecordedSnapshotter, record: Record) -> Record:
    """A checkpoint with the size of its change."""
    if CHANGED in record.labels or record.size is not None:
        return record
    inodes, size = snapshotter.usage_of(record)
    return record._replace(inodes=inodes, size=size)


def _before(
    snapshotter: RecordedSnapshotter, record: Record, known: Mapping[str, Record]
) -> Iterator[tuple[str, Record]]:
    """What a top or a checkpoint came from, nearest first, until a checkpoint that is known; without the base."""
    at = record.labels[AT]
    while at != BASE_ID and at not in known:
        try:
            record = snapshotter.record(node_name(at))
        except errors.NotFound:
            return  # removed meanwhile
        yield at, record
        at = record.labels[AT]


def of_workspace(snapshotter: RecordedSnapshotter, top: Record) -> list[Record]:
    """The checkpoints of a workspace and those that it came from, oldest first, without the base."""
    own = snapshotter.catalog.walk(OWNER, Condition(HAS_LABEL, (LINE, top.labels[LINE])))
    found = {node_id(record): record for record in own if is_node(record)}
    for start in [top, *found.values()]:
        found.update(_before(snapshotter, start, found))
    return sorted((r for r in found.values() if FORGOTTEN not in r.labels), key=lambda record: record.id)


def not_kept(
    snapshotter: RecordedSnapshotter, top: Record, last: int, newer_than: float | None, *, named: bool
) -> list[Record]:
    """The checkpoints that a workspace made and that :meth:`Workspace.keep` forgets; the arguments are the same."""
    own = [r for r in of_workspace(snapshotter, top) if r.labels[LINE] == top.labels[LINE]]
    kept = {top.labels[AT]} | {node_id(record) for record in own[len(own) - min(last, len(own)) :]}
    since = time.time_ns() - (newer_than or 0) * 1e9
    return [
        record
        for record in own
        if node_id(record) not in kept
        and not (newer_than is not None and record.created_ns >= since)
        and not (named and names_in(record.labels, top.labels))
    ]


def forget(snapshotter: RecordedSnapshotter, records: Iterable[Record], *, everywhere: bool = False) -> dict[str, str]:
    """Take checkpoints out of the history; what came after them is then after what came before them.

    Those that a workspace stands on stay.

    Args:
        snapshotter: of the workspaces.
        records: of the checkpoints.
        everywhere: take these out, too. A tree that lies on one then counts as changed.

    Returns:
        The ids of these, and for each one such workspace.

    Raises:
        OnlapError: an error of the catalog.
    """
    catalog = snapshotter.catalog
    identifiers = [node_id(record) for record in records]

    def operation(connection: Connection) -> tuple[list[int], dict[str, str]]:
        changed, stay = [], {}
        for identifier in identifiers:
            record = rows.find(connection, OWNER, node_name(identifier))
            if record is None or FORGOTTEN in record.labels:
                continue
            followers = rows.all_where(connection, OWNER, Condition(HAS_LABEL, (AT, identifier)))
            standing = [workspace_of(follower.name) for follower in followers if is_top(follower)]
            if standing and not everywhere:
                stay[identifier] = min(standing)
                continue
            for follower in followers:
                rows.set_labels(connection, follower.id, {AT: record.labels[AT]})
                changed.append(follower.id)
            names = {key: None for key in record.labels if key.startswith(name_label(""))}
            rows.set_labels(connection, record.id, {**names, FORGOTTEN: "yes"})
            changed.append(record.id)
        return changed, stay

    # It is how space is freed, so it has to work on a full disk.
    changed, stay = catalog.garbage.with_space(lambda: catalog.database.write(operation))
    for identifier in changed:
        catalog.sidecars.changed(identifier)
    collect(snapshotter)
    return stay


def newest_captures(snapshotter: RecordedSnapshotter) -> Callable[[Record], bool]:
    """A function that tells whether a snapshot is the newest capture of its directory, and made within a week."""
    newest = {record.labels[DIRECTORY]: record.id for record in snapshotter.catalog.walk(OWNER) if is_capture(record)}
    since = time.time_ns() - _KEEP_CAPTURE_NS
    return lambda record: (
        is_capture(record) and newest.get(record.labels[DIRECTORY]) == record.id and record.created_ns > since
    )


def may_leave_some(snapshotter: RecordedSnapshotter, top: Record) -> bool:
    """Whether there may be something for :func:`collect`, which looks at everything, now that a top was removed."""
    made = snapshotter.catalog.walk(OWNER, Condition(HAS_LABEL, (LINE, top.labels[LINE])))
    if any(map(is_node, made)):
        return True
    if top.labels[AT] == BASE_ID:
        return False
    try:
        at = below(snapshotter, top)
        other = snapshotter.record(top_key(at.labels[WORKSPACE]))
    except errors.NotFound:
        return True
    # If the workspace that made that checkpoint is still there, it keeps it, and all before.
    return FORGOTTEN in at.labels or other.labels[LINE] != at.labels[LINE]


def collect(snapshotter: RecordedSnapshotter, used: Callable[[Record], bool] = is_capture) -> int:
    """Remove the checkpoints that belong to no workspace or are forgotten, and on which nothing stands.

    Args:
        snapshotter: of the workspaces.
        used: whether another snapshot on which nothing stands is still of use; by default every capture is.

    Returns:
        How many were removed.

    Raises:
        OnlapError: an error of the catalog.
    """
    catalog = snapshotter.catalog
    everything = list(catalog.walk(OWNER))
    lines = {record.labels[LINE] for record in everything if is_top(record)}
    by_id = {node_id(record): record for record in everything if is_node(record)}
    wanted: set[str] = set()
    for record in everything:
        at: str | None = record.labels.get(AT)
        if is_node(record):
            if FORGOTTEN in record.labels or record.labels[LINE] not in lines:
                continue
            at = node_id(record)
        elif not is_top(record):
            continue
        while at is not None and at in by_id and at not in wanted:
            wanted.add(at)
            at = by_id[at].labels[AT]
    children: dict[int, int] = {}
    for record in everything:
        if record.parent_id is not None:
            children[record.parent_id] = children.get(record.parent_id, 0) + 1
    removed = 0
    for record in reversed(everything):  # a child has a higher id than its parent
        if is_top(record) or children.get(record.id):
            continue
        if is_node(record):
            kept = node_id(record) in wanted and FORGOTTEN not in record.labels
        else:
            kept = used(record)
        if kept:
            continue
        with contextlib.suppress(errors.NotFound, errors.FailedPrecondition):  # another process was faster, or uses it
            catalog.remove(OWNER, record.name, wait=False, only=record.id)
            removed += 1
            if record.parent_id is not None:
                children[record.parent_id] -= 1
    return removed
