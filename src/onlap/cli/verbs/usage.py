"""``onlap usage``."""

from __future__ import annotations

from onlap.catalog.records import Record
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.each import each
from onlap.cli.shared.things import find, name_text, records, usage_as_json
from onlap.cli.terminal.text import size
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Bytes and inodes that snapshots take, each without its parents; an active one is measured now. In a root of\n"
        "native copies each has its whole tree.",
        "onlap usage",
        "onlap usage work base",
    )
    parser.key("keys", nargs="*", help="which ones; all by default")


def run(call: Call) -> int:
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
                out.item({"name": record.name, "owner": record.owner, "usage": usage_as_json(taken)})
            else:
                rows.append((shown(record.name), name_text(record.owner), f"{taken.inodes:,}", size(taken.size)))

        if call.args.keys:
            status = each(call, call.args.keys, lambda key: show(find(store, key)))
        else:
            status = each(call, records(store), show)
    if not out.json:
        if len(rows) > 1:
            rows.append(("total", "", f"{inodes:,}", size(total)))
        out.table(("NAME", "OWNER", "INODES", "SIZE"), rows, right=(2, 3))
    return status
