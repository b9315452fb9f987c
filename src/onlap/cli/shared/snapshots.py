"""Snapshots as the command shows them: found among those of every owner, and as JSON and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.catalog.records import ACTIVE, COMMITTED, VIEW, Info, Record, not_found, of_any_owner
from onlap.cli.terminal import text
from onlap.errors import shown
from onlap.trees.usage import Usage

if TYPE_CHECKING:
    from onlap.cli.call import Call
    from onlap.mounts.plan import Mount
    from onlap.snapshots.filters import Selector
    from onlap.store import Store


def records(store: Store, filters: Sequence[str] = ()) -> Iterator[Record]:
    """The records of every owner that match one of the filters, oldest first.

    Raises:
        InvalidArgument: a filter can match nothing. containerd's clients may send such a filter; on a command line it
            is a mistake.
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
            f"snapshots have no field {shown(field)}",
            key=field,
            hint='a filter is, for example, name==a, parent==a, kind==active, labels."a/b"==c',
        )
    if field == "labels" and not selector.label:
        raise errors.InvalidArgument(
            "the filter names no label", key=field, hint='a filter is, for example, labels."a/b"==c'
        )
    if field == "kind" and selector.operator == "==" and selector.value not in (ACTIVE, VIEW, COMMITTED):
        raise errors.InvalidArgument(
            f"there is no kind {shown(selector.value)}", key=selector.value, hint="active, view or committed"
        )


def find(store: Store, key: str) -> Record:
    """The record of a key: the command's own, or that of the only other owner who has one.

    Raises:
        NotFound: no owner has it.
        FailedPrecondition: several other owners have it.
    """
    try:
        return store.snapshotter.record(key)
    except errors.NotFound:
        found = store.snapshotter.catalog.database.read(lambda c: of_any_owner(c, key))
    if not found:
        raise not_found(key)
    if len(found) > 1:
        owners = shown(", ".join(record.owner for record in found))
        raise errors.FailedPrecondition(
            f"several owners have a snapshot {shown(key)}: {owners}", key=key, hint="use their own tools"
        )
    return found[0]


def known_usage(record: Record) -> Usage | None:
    """The usage of a snapshot, if it is known without walking its tree."""
    if record.kind == VIEW:
        return Usage()
    if record.inodes is None or record.size is None:
        return None
    return Usage(record.inodes, record.size)


def measure(call: Call, store: Store, name: str) -> Usage | None:
    """Measure a new layer, so that ``onlap ls`` can show it: a store's background thread would end too soon."""
    try:
        return store.usage(name)
    except errors.OnlapError as error:
        call.out.warn(f"committed, but not measured: {error}")
        return None


def as_json(info: Info | Record, usage: Usage | None) -> dict[str, object]:
    """A snapshot as a JSON object; ``usage`` is null if it is not known."""
    return {
        "name": info.name,
        "kind": info.kind,
        "parent": info.parent,
        "owner": info.owner,
        "labels": info.labels,
        "created_ns": info.created_ns,
        "updated_ns": info.updated_ns,
        "usage": usage._asdict() if usage is not None else None,
    }


def mount_as_json(mount: Mount) -> dict[str, object]:
    """A mount as a JSON object: containerd's fields, and an overlay's layers as fields of their own."""
    return {**mount._asdict(), "options": mount.options}


def size_text(usage: Usage | None) -> str:
    """The bytes of a usage for people."""
    return text.size(usage.size) if usage is not None else text.NOTHING


def name_text(name: str | None) -> str:
    """A key, name or owner for people."""
    return shown(name) if name else text.NOTHING
