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
    from onlap.images.disk_usage import Item


def arguments(parser: Parser) -> None:
    parser.explain(
        "What the root holds: snapshots, layers of images, blobs, what was removed and waits, leases; who keeps what;\n"
        "and what onlap cleanup would free. Nothing is walked: what has not been measured yet counts as nothing, and\n"
        "the last lines say so. With --json an object per thing, with its holders, and one of the filesystem.",
        "onlap df",
        "onlap df --json | jq -r 'select(.type == \"blob\" and .reclaimable) | .name'",
    )


def run(call: Call) -> None:
    from onlap.images import disk_usage

    out = call.out
    with call.store() as store:
        items = list(disk_usage.items(store.snapshotter, store.content))
        root = store.snapshotter.root
        free, total = _filesystem(root)
    if out.json:
        for item in items:
            out.item(item._asdict())
        out.item({"type": "filesystem", "name": root, "size": total, "free": free})
        return
    named = {
        disk_usage.SNAPSHOT: "snapshots",
        disk_usage.LAYER: "layers",
        disk_usage.BLOB: "blobs",
        disk_usage.PARTIAL: "parts of blobs",
    }
    rows = [_row(words, [item for item in items if item.type == kind]) for kind, words in named.items()]
    waiting = sum(item.type == disk_usage.TRASH for item in items)
    rows.append(("removed trees", f"{waiting:,}", NOTHING, NOTHING))
    out.table(("WHAT", "COUNT", "SIZE", "RECLAIMABLE"), rows, right=(1, 2, 3))
    held = _held(items)
    if held:
        out.line()
        out.table(("HELD BY", "BLOBS", "LAYERS", "SIZE"), held, right=(1, 2, 3))
    out.line()
    out.line(f"{size(free)} free of {size(total)} at {shown(root)}")
    unknown = sum(item.size is None for item in items if item.type in (disk_usage.SNAPSHOT, disk_usage.LAYER))
    if unknown:
        out.line(f"{count(unknown, 'snapshot is', 'snapshots are')} not measured: see onlap usage")


def _filesystem(root: str) -> tuple[int, int]:
    """Bytes that are free for us, and all, of the filesystem that the root is on."""
    with errors.translated("measure the filesystem", key=root):
        found = os.statvfs(root)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _row(words: str, items: Sequence[Item]) -> tuple[str, ...]:
    known = [(item.size or 0, item.reclaimable) for item in items]
    freed = sum(taken for taken, reclaimable in known if reclaimable)
    return words, f"{len(items):,}", size(sum(taken for taken, _ in known)), size(freed)


def _held(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """Who keeps what by itself; not what stands on what, which onlap tree shows."""
    kinds = ("blob", "partial"), ("layer", "snapshot")
    found: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        for holder in item.holders:
            if not holder.startswith("snapshot "):
                found[holder].append(item)
    return [
        (
            shown(holder),
            *(f"{sum(item.type in kind for item in held):,}" for kind in kinds),
            size(sum(item.size or 0 for item in held if item.type in kinds[0])),
        )
        for holder, held in sorted(found.items())
    ]
