"""The checks that the snapshotter contract demands before a change, and their errors."""

from __future__ import annotations

from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.records import ACTIVE, COMMITTED, Record
from onlap.errors import shown


def check_parent(connection: Connection, owner: str, parent: str | None) -> Record | None:
    """The record of the parent of a new snapshot; None without one."""
    if not parent:
        return None
    record = records.find(connection, owner, parent)
    if record is None:
        raise no_parent(parent)
    if record.kind != COMMITTED:
        raise errors.InvalidArgument(
            f"the parent {shown(parent)} is {_kind(record)}, not committed",
            key=parent,
            hint="commit it first",
        )
    return record


def no_parent(name: str) -> errors.NotFound:
    """The error for a parent that does not exist."""
    return errors.NotFound(f"there is no parent snapshot {shown(name)}", key=name, hint="see the names with: onlap ls")


def check_commit(connection: Connection, owner: str, name: str, key: str, parent: str | None) -> Record:
    """The record to commit, or an error; the checks are in the contract's order."""
    record = records.find(connection, owner, key)
    if record is None:
        other = records.find(connection, owner, name)
        swapped = other is not None and other.kind == ACTIVE
        hint = f"commit(name, key): {shown(name)} is active; did you swap the two?" if swapped else None
        raise errors.NotFound(f"there is no snapshot {shown(key)}", key=key, hint=hint or "see: onlap ls")
    if records.exists(connection, owner, name):
        raise records.already_exists(name)
    if record.kind != ACTIVE:
        raise errors.FailedPrecondition(
            f"snapshot {shown(key)} is {_kind(record)}, and only an active one can be committed", key=key
        )
    if parent and record.parent is not None and record.parent != parent:
        raise errors.InvalidArgument(
            f"the parent of snapshot {shown(key)} is {shown(record.parent)}, not {shown(parent)}", key=key
        )
    return record


def check_rebase(connection: Connection, owner: str, parent: str) -> Record:
    """The record of the parent that a commit names."""
    above = records.find(connection, owner, parent)
    if above is None:
        raise no_parent(parent)
    if above.kind != COMMITTED:
        raise errors.FailedPrecondition(f"the parent {shown(parent)} is {_kind(above)}, not committed", key=parent)
    return above


def _kind(record: Record) -> str:
    return {"view": "a view", "active": "active", "committed": "committed"}[record.kind]


def lost(record: Record) -> errors.DataLoss:
    """The error for a snapshot that has a record and no tree."""
    return errors.DataLoss(
        f"the tree of snapshot {shown(record.name)} is lost",
        key=record.name,
        hint="bring it back with: onlap check --repair; or remove the snapshot, children first, and create it again",
    )
