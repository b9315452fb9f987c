"""``onlap cleanup``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import count


def arguments(parser: Parser) -> None:
    parser.explain(
        "Delete what belongs to no snapshot: removed trees that wait, what a crash left behind, the mounts, snapshots\n"
        "and containers of programs that were killed, and blobs that no image needs. A tree that is mounted or read\n"
        "somewhere goes on waiting.",
        "onlap cleanup",
    )


def run(call: Call) -> None:
    with call.store() as store:
        catalog = store.snapshotter.catalog
        blobs = store.collect()
        deleted = catalog.garbage.cleanup()
        waiting = len(catalog.trash.names())
    if call.out.json:
        call.out.item({"deleted": deleted, "blobs": blobs, "waiting": waiting})
        return
    said = [count(number, word) for number, word in ((deleted, "tree"), (blobs, "blob")) if number]
    call.out.line(f"deleted {' and '.join(said)}" if said else "nothing to delete")
    if waiting:
        call.out.warn(f"{count(waiting, 'removed tree is', 'removed trees are')} still mounted or read somewhere")
