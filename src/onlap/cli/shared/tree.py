"""Snapshots drawn as a tree, children below their parents."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from onlap.catalog.records import Record
from onlap.cli.shared.things import as_json, find, name_text, records, size_text
from onlap.cli.terminal.output import Output, can_draw
from onlap.cli.terminal.text import age
from onlap.errors import shown
from onlap.store import Store

_DRAWN = ("├─ ", "└─ ", "│  ", "   ")
_ASCII = ("|- ", "`- ", "|  ", "   ")


class Node(NamedTuple):
    """A snapshot in the tree.

    Attributes:
        record: the snapshot.
        lasts: for each of its ancestors except the root, and itself: whether it is the last child of its parent.
    """

    record: Record
    lasts: tuple[bool, ...]


def print_tree(out: Output, store: Store, key: str | None = None) -> None:
    """Print the tree of a store, or one snapshot's part of it."""
    every = {record.id: record for record in records(store)}
    if key is not None:
        every = _related(every, find(store, key))
    nodes = list(_in_order(every))
    if out.json:
        for node in nodes:
            thing = as_json(node.record, store.snapshotter.usage_of(node.record))
            out.item({**thing, "depth": len(node.lasts)})
        return
    now = time.time_ns()
    marks = _DRAWN if can_draw() else _ASCII
    rows = [
        (
            _lines(node, marks) + shown(node.record.name),
            node.record.kind,
            name_text(node.record.owner),
            age(node.record.created_ns, now),
            size_text(store.snapshotter.usage_of(node.record)),
        )
        for node in nodes
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
    # The order of the records need not be that of the tree: several passes find all descendants.
    while new := {r.id for r in every.values() if r.parent_id in below} - below:
        below |= new
    return {identifier: r for identifier, r in every.items() if identifier in kept | below}


def _in_order(every: dict[int, Record]) -> Iterator[Node]:
    """Parents before children, siblings by age; without recursion, since a tree may be 500 levels deep."""
    children: dict[int | None, list[Record]] = {}
    for record in every.values():
        # If a parent was removed between two pages of the walk, its children are roots.
        children.setdefault(record.parent_id if record.parent_id in every else None, []).append(record)
    stack = [Node(record, ()) for record in reversed(children.get(None, []))]
    while stack:
        node = stack.pop()
        yield node
        below = children.get(node.record.id, [])
        stack += [Node(r, (*node.lasts, r is below[-1])) for r in reversed(below)]


def _lines(node: Node, marks: tuple[str, str, str, str]) -> str:
    if not node.lasts:
        return ""
    branch, last_branch, line, space = marks
    above = "".join(space if last else line for last in node.lasts[:-1])
    return above + (last_branch if node.lasts[-1] else branch)
