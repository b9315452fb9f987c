"""The verbs that show snapshots: ls, tree, info and usage."""

from __future__ import annotations

import time

from onlap.catalog.records import Record
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.snapshots import as_json, find, known_usage, name_text, records, size_text
from onlap.cli.shared.tree import print_tree
from onlap.cli.terminal.text import NOTHING, age, count, moment, size
from onlap.errors import shown


def ls_arguments(parser: Parser) -> None:
    parser.explain(
        'List the snapshots of every owner, oldest first. SIZE is that of the layer alone, and "-" if its tree would\n'
        "have to be walked (see: onlap usage). With -q: names only.\n\n"
        'A FILTER is one of containerd\'s: name==a  parent!=""  kind==active  labels."a/b"==c  name~=^build-\n'
        'A comma means "and"; of several filters one has to match.',
        "onlap ls",
        "onlap ls kind==active,parent==base",
        "onlap ls --json | jq -r .name",
    )
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="which ones; all by default")


def ls(call: Call) -> None:
    now = time.time_ns()
    with call.store() as store:
        call.out.listing(
            records(store, call.args.filters),
            lambda record: as_json(record, known_usage(record)),
            lambda record: record.name,
            ("NAME", "KIND", "PARENT", "OWNER", "AGE", "SIZE"),
            lambda record: (
                shown(record.name),
                record.kind,
                name_text(record.parent),
                name_text(record.owner),
                age(record.created_ns, now),
                size_text(known_usage(record)),
            ),
            right=(4, 5),
        )


def tree_arguments(parser: Parser) -> None:
    parser.explain(
        "Show the snapshots below their parents, with the size of each one's own layer. With a KEY: its ancestors and\n"
        "descendants only.",
        "onlap tree",
        "onlap tree base",
    )
    parser.key("key", nargs="?", help="show only its ancestors and descendants")


def tree(call: Call) -> None:
    with call.store() as store:
        print_tree(call.out, store, call.args.key)


def info_arguments(parser: Parser) -> None:
    parser.explain(
        "Show everything about a snapshot: kind, parent, times, labels, the usage of its layer, and the directories\n"
        "that make up its tree, topmost first.",
        "onlap info base",
    )
    parser.key("key", help="a snapshot of any kind")


def info(call: Call) -> None:
    out = call.out
    with call.store() as store:
        record = find(store, call.args.key)
        usage = store.snapshotter.usage_of(record)
        layers = store.snapshotter.layers(record)
    if out.json:
        out.item({**as_json(record, usage), "id": record.id, "layers": layers})
        return
    rows = [
        ("name", shown(record.name)),
        ("kind", record.kind),
        ("parent", name_text(record.parent)),
        ("owner", name_text(record.owner)),
        ("created", moment(record.created_ns)),
        ("updated", moment(record.updated_ns)),
        ("usage", f"{size(usage.size)} in {count(usage.inodes, 'inode')}"),
    ]
    rows += _rows("labels", [f"{shown(key)}={shown(value)}" for key, value in sorted(record.labels.items())])
    rows += _rows("layers", [shown(layer) for layer in layers])
    for name, value in rows:
        out.line(f"{name:<8} {value}")


def _rows(name: str, values: list[str]) -> list[tuple[str, str]]:
    return [(name if index == 0 else "", value) for index, value in enumerate(values or [NOTHING])]


def usage_arguments(parser: Parser) -> None:
    parser.explain(
        "Show the bytes and inodes that snapshots take, each without its parents; an active one is measured now. In a\n"
        "root of native copies each has its whole tree.",
        "onlap usage",
        "onlap usage work base",
    )
    parser.key("keys", nargs="*", help="which ones; all by default")


def usage(call: Call) -> int:
    out = call.out
    rows: list[tuple[str, str, str, str]] = []
    inodes = total = 0
    with call.store() as store:

        def show(record: Record) -> None:
            nonlocal inodes, total
            taken = store.snapshotter.usage_of(record)
            inodes += taken.inodes
            total += taken.size
            if out.json:
                out.item({"name": record.name, "owner": record.owner, "usage": taken._asdict()})
            else:
                rows.append((shown(record.name), name_text(record.owner), f"{taken.inodes:,}", size(taken.size)))

        if call.args.keys:
            status = call.each(call.args.keys, lambda key: show(find(store, key)))
        else:
            status = call.each(records(store), show)
    if not out.json:
        if len(rows) > 1:
            rows.append(("total", "", f"{inodes:,}", size(total)))
        out.table(("NAME", "OWNER", "INODES", "SIZE"), rows, right=(2, 3))
    return status
