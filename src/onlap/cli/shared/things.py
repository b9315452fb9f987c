"""Snapshots as the command shows them: found among those of every owner, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.catalog.records import ACTIVE, COMMITTED, VIEW, Info, Record, not_found
from onlap.cli.terminal import text
from onlap.errors import shown
from onlap.trees.usage import Usage

if TYPE_CHECKING:
    from onlap.snapshots.filters import Selector
    from onlap.store import Store


def records(store: Store, filters: Sequence[str] = ()) -> Iterator[Record]:
    """The records of every owner that one of the filters matches, in the order of their making.

    Raises:
        InvalidArgument: one can match nothing. containerd's clients may ask so; who types it made a mistake.
    """
    from onlap.snapshots.filters import parse

    parsed = parse(*filters)
    for selector in (selector for selectors in parsed.alternatives for selector in selectors):
        _check_selector(selector)
    return (record for record in store.snapshotter.catalog.walk(None) if parsed.matches(record))


def _check_selector(selector: Selector) -> None:
    field = selector.field
    if field not in ("name", "parent", "kind", "labels"):
        raise errors.InvalidArgument(
            f"no snapshot has a field {shown(field)}",
            key=field,
            hint='a filter is as name==a, parent==a, kind==active, labels."a/b"==c',
        )
    if field == "labels" and not selector.label:
        raise errors.InvalidArgument("which label?", key=field, hint='a filter is as labels."a/b"==c')
    if field == "kind" and selector.operator == "==" and selector.value not in (ACTIVE, VIEW, COMMITTED):
        raise errors.InvalidArgument(
            f"there is no kind {shown(selector.value)}", key=selector.value, hint="active, view or committed"
        )


def find(store: Store, key: str) -> Record:
    """The record of a key: ours, or that of the one other owner who has it.

    Raises:
        NotFound: nobody has it.
        FailedPrecondition: several others have it.
    """
    try:
        return store.snapshotter.record(key)
    except errors.NotFound:
        found = [record for record in store.snapshotter.catalog.walk(None) if record.name == key]
    if not found:
        raise not_found(key)
    if len(found) > 1:
        owners = shown(", ".join(record.owner for record in found))
        raise errors.FailedPrecondition(
            f"snapshot {shown(key)} is there for several owners: {owners}", key=key, hint="ask them"
        )
    return found[0]


def known_usage(record: Record) -> Usage | None:
    """What a snapshot takes, where that is known without walking its tree."""
    if record.kind == VIEW:
        return Usage()
    if record.inodes is None or record.size is None:
        return None
    return Usage(record.inodes, record.size)


def as_json(info: Info | Record, taken: Usage | None) -> dict[str, object]:
    """A snapshot as a JSON object; ``usage`` is null where it is not known."""
    return {
        "name": info.name,
        "kind": info.kind,
        "parent": info.parent,
        "owner": info.owner,
        "labels": info.labels,
        "created_ns": info.created_ns,
        "updated_ns": info.updated_ns,
        "usage": usage_as_json(taken),
    }


def usage_as_json(taken: Usage | None) -> dict[str, int] | None:
    """A usage as a JSON object."""
    return {"inodes": taken.inodes, "size": taken.size} if taken is not None else None


def size_text(taken: Usage | None) -> str:
    """A usage's bytes for people."""
    return text.size(taken.size) if taken is not None else text.NOTHING


def name_text(name: str | None) -> str:
    """A key, name or owner for people."""
    return shown(name) if name else text.NOTHING
