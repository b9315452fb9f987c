"""``onlap df``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import NOTHING, count, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.images.disk import Thing


def arguments(parser: Parser) -> None:
    parser.explain(
        "What the root holds: snapshots, layers of images, blobs, what was removed and waits, leases; who keeps what;\n"
        "and what onlap cleanup would free. Nothing is walked: what has not been measured yet counts as nothing, and\n"
        "the last lines say so. With --json an object per thing, with its holders, and one of the filesystem.",
        "onlap df",
        "onlap df --json | jq -r 'select(.type == \"blob\" and .reclaimable) | .name'",
    )


def run(call: Call) -> None:
    from onlap.images import disk

    out = call.out
    with call.store() as store:
        things = list(disk.things(store.snapshotter, store.content))
        root = store.snapshotter.root
        free, total = _filesystem(root)
    if out.json:
        for thing in things:
            out.item(thing._asdict())
        out.item({"type": "filesystem", "name": root, "size": total, "free": free})
        return
    named = {disk.SNAPSHOT: "snapshots", disk.LAYER: "layers", disk.BLOB: "blobs", disk.PARTIAL: "parts of blobs"}
    rows = [_row(words, [thing for thing in things if thing.type == kind]) for kind, words in named.items()]
    waiting = sum(thing.type == disk.TRASH for thing in things)
    rows.append(("removed trees", f"{waiting:,}", NOTHING, NOTHING))
    out.table(("WHAT", "COUNT", "SIZE", "RECLAIMABLE"), rows, right=(1, 2, 3))
    held = _held(things)
    if held:
        out.line()
        out.table(("HELD BY", "BLOBS", "LAYERS", "SIZE"), held, right=(1, 2, 3))
    out.line()
    out.line(f"{size(free)} free of {size(total)} at {shown(root)}")
    unknown = sum(thing.size is None for thing in things if thing.type in (disk.SNAPSHOT, disk.LAYER))
    if unknown:
        out.line(f"{count(unknown, 'snapshot is', 'snapshots are')} not measured: see onlap usage")


def _filesystem(root: str) -> tuple[int, int]:
    """Bytes that are free for us, and all, of the filesystem that the root is on."""
    with errors.translated("measure the filesystem", key=root):
        found = os.statvfs(root)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _row(words: str, things: Sequence[Thing]) -> tuple[str, ...]:
    known = [(thing.size or 0, thing.reclaimable) for thing in things]
    freed = sum(taken for taken, reclaimable in known if reclaimable)
    return words, f"{len(things):,}", size(sum(taken for taken, _ in known)), size(freed)


def _held(things: Sequence[Thing]) -> list[tuple[str, ...]]:
    """Who keeps what by itself; not what stands on what, which onlap tree shows."""
    kinds = ("blob", "partial"), ("layer", "snapshot")
    found: defaultdict[str, list[Thing]] = defaultdict(list)
    for thing in things:
        for holder in thing.holders:
            if not holder.startswith("snapshot "):
                found[holder].append(thing)
    return [
        (
            shown(holder),
            *(f"{sum(thing.type in kind for thing in held):,}" for kind in kinds),
            size(sum(thing.size or 0 for thing in held if thing.type in kinds[0])),
        )
        for holder, held in sorted(found.items())
    ]
