"""Snapshots drawn as a tree, children below their parents."""

from __future__ import annotations

import time
from collections.abc import Iterator

from onlap.catalog.records import Record
from onlap.cli.shared.snapshots import as_json, find, name_text, records, size_text
from onlap.cli.terminal.output import Output, can_draw
from onlap.cli.terminal.text import age
from onlap.errors import shown
from onlap.store import Store

_DRAWN = ("├─ ", "└─ ", "│  ", "   ")
_ASCII = ("|- ", "`- ", "|  ", "   ")


def strokes() -> tuple[str, str, str, str]:
    """What draws a branch, the last branch, and what continues below each of them."""
    return _DRAWN if can_draw() else _ASCII


def print_tree(out: Output, store: Store, key: str | None = None) -> None:
    """Print the tree of a store, or one snapshot's part of it."""
    every = {record.id: record for record in records(store)}
    if key is not None:
        every = _related(every, find(store, key))
    nodes = list(_in_order(every))
    if out.json:
        for record, depth, _ in nodes:
            out.item({**as_json(record, store.snapshotter.usage_of(record)), "depth": depth})
        return
    now = time.time_ns()
    rows = [
        (
            lines + shown(record.name),
            record.kind,
            name_text(record.owner),
            age(record.created_ns, now),
            size_text(store.snapshotter.usage_of(record)),
        )
        for record, _, lines in nodes
    ]
    out.table(("NAME", "KIND", "OWNER", "AGE", "SIZE"), rows, right=(3, 4))


def _related(every: dict[int, Record], record: Record) -> dict[int, Record]:
    """A snapshot with its ancestors and descendants."""
    kept = {record.id}
    parent = record.parent_id
    while parent is not None and parent in every:
        kept.add(parent)
        parent = every[parent].parent_id
    below = {record.id}
    # A parent was made before its children, but not committed before them: several passes find them all.
    while new := {r.id for r in every.values() if r.parent_id in below} - below:
        below |= new
    return {identifier: r for identifier, r in every.items() if identifier in kept | below}


def _in_order(every: dict[int, Record]) -> Iterator[tuple[Record, int, str]]:
    """Each snapshot with its depth and the lines before it: parents before children, siblings by age.

    Without recursion, since a stack may be 500 deep.
    """
    children: dict[int | None, list[Record]] = {}
    for record in every.values():
        # If a parent was removed between two pages of the walk, its children are roots.
        children.setdefault(record.parent_id if record.parent_id in every else None, []).append(record)
    branch, last_branch, line, space = strokes()
    pending = [(record, 0, "", "") for record in reversed(children.get(None, []))]
    while pending:
        record, depth, lines, below = pending.pop()
        yield record, depth, lines
        for child in reversed(siblings := children.get(record.id, [])):
            last = child is siblings[-1]
            pending.append(
                (child, depth + 1, below + (last_branch if last else branch), below + (space if last else line))
            )
