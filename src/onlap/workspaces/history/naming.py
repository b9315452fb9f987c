"""How checkpoints are named: a workspace gives a checkpoint names, and finds it by one of them or by its id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from sqlite3 import Connection

from onlap import cancellation, errors
from onlap.catalog import records as rows
from onlap.catalog.records import HAS_LABEL, Condition, Record
from onlap.errors import shown
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.workspaces.history.checkpoints import base_of
from onlap.workspaces.records import (
    BASE,
    BASE_ID,
    FORGOTTEN,
    LINE,
    OWNER,
    Checkpoint,
    base_name_label,
    name_label,
    names_in,
    node_id,
    node_name,
    workspace_of,
)


def find(snapshotter: RecordedSnapshotter, top: Record, reference: Checkpoint | str) -> Record:
    """The snapshot of a checkpoint that a workspace may use.

    Args:
        snapshotter: of the workspaces.
        top: of the workspace.
        reference: a checkpoint, its id, or a name that the workspace gave it.

    Raises:
        NotFound: there is none, or it is another tree's.
    """
    text = reference.id if isinstance(reference, Checkpoint) else reference
    if not isinstance(text, str):
        raise errors.InvalidArgument(
            f"{shown(repr(reference))} is not a checkpoint", hint="pass a Checkpoint, its id, or its name"
        )
    if _is_base(top, text):
        return base_of(snapshotter, top)
    record = snapshotter.catalog.database.read(lambda connection: _made(connection, top, text))
    if record is not None:
        return record
    workspace = workspace_of(top.name)
    raise errors.NotFound(
        f"workspace {shown(workspace)} has no checkpoint {shown(text)}",
        key=text,
        hint=f"see: onlap ws log {shown(workspace)}",
    )


def _is_base(top: Record, text: str) -> bool:
    return text == BASE_ID or base_name_label(text) in top.labels


def _made(connection: Connection, top: Record, text: str) -> Record | None:
    """The checkpoint of this name or id, other than the base."""
    if not rows.is_text(text):
        return None
    named = rows.all_where(connection, OWNER, Condition(HAS_LABEL, (name_label(text), top.labels[LINE])))
    if named:
        return named[0]
    record = rows.find(connection, OWNER, node_name(text))
    if record is None or record.labels.get(BASE) != top.labels[BASE] or FORGOTTEN in record.labels:
        return None
    return record


def check_unused(connection: Connection, top: Record, names: Iterable[str]) -> None:
    """Raise AlreadyExists if a workspace has a checkpoint of one of these names.

    A check before something is done saves it from being done in vain; only one in the transaction that gives the name
    excludes other threads and processes.
    """
    for name in names:
        is_base = _is_base(top, name)
        if is_base or _made(connection, top, name) is not None:
            workspace = workspace_of(top.name)
            raise errors.AlreadyExists(
                f"workspace {shown(workspace)} has a checkpoint {shown(name)} already",
                key=name,
                hint="choose another name"
                if is_base
                else f"choose another name, or forget that one: onlap ws forget {shown(workspace)} {shown(name)}",
            )


def give(snapshotter: RecordedSnapshotter, top: Record, record: Record, name: str) -> Record:
    """Give a checkpoint a name in a workspace; its snapshot as it is then.

    Raises:
        AlreadyExists: another checkpoint of the workspace has the name.
        NotFound: the checkpoint has been forgotten meanwhile, or the workspace removed.
    """
    if node_id(record) == BASE_ID:
        key, label, value = top.name, base_name_label(name), "yes"
        given = label in top.labels
    else:
        key, label, value = record.name, name_label(name), top.labels[LINE]
        given = name in names_in(record.labels, top.labels)
    if given:
        return record

    def change(connection: Connection, named: Record) -> None:
        if FORGOTTEN in named.labels:
            raise rows.not_found(named.name)
        check_unused(connection, rows.get(connection, OWNER, top.name), [name])
        rows.set_labels(connection, named.id, {label: value})

    def take() -> None:
        with contextlib.suppress(errors.NotFound):
            snapshotter.label(key, {label: None})

    changed = snapshotter.catalog.update(OWNER, key, change)
    cancellation.made(take)
    return record if key == top.name else changed
