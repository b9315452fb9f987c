"""The verbs for the root as a whole: init, df, cleanup and probe."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser, UsageError
from onlap.cli.terminal.text import NOTHING, count, size
from onlap.errors import shown
from onlap.probing.probe import FEATURES, MODES, NATIVE, Probe, existing_above, overlay_mode

if TYPE_CHECKING:
    from onlap.images.disk_usage import Item
    from onlap.snapshots.recorded import RecordedSnapshotter
    from onlap.store import SnapshotterKind

# What each mode of a root means, for people.
_MODES = dict(
    zip(MODES, ("overlay", "overlay with userxattr, mounted in a user namespace", "native copies"), strict=True)
)


def init_arguments(parser: Parser) -> None:
    parser.explain(
        "Make a root, where snapshots are kept, or show what an existing one is. The choices made here are fixed for\n"
        'the life of the root. "auto" takes overlay where that can be mounted (see: onlap probe), and native copies\n'
        "elsewhere; prepare and import make a root with it.",
        "onlap init",
        "onlap --root /srv/snapshots init --snapshotter native",
    )
    parser.add_argument(
        "--snapshotter", choices=("auto", "overlay", "native"), default="auto", help="how to keep snapshots (auto)"
    )
    parser.add_argument(
        "--redirect-dir",
        action="store_true",
        help="allow renaming directories of lower layers; containerd and Docker cannot read such layers",
    )


def init(call: Call) -> None:
    root, args = call.root, call.args
    if args.redirect_dir and args.snapshotter == "native":
        raise UsageError("--redirect-dir is for overlays")
    check_access(root, create=True)
    made = not os.path.lexists(os.path.join(root, "catalog.db"))
    why = ""
    if made and args.snapshotter != "native":
        mode, why = overlay_mode(existing_above(root))
        if args.snapshotter == "overlay" and mode == NATIVE:
            call.out.warn(f"{why}; the root is made anyway, for a machine where overlays work")
    with _open(root, args.snapshotter, args.redirect_dir) as snapshotter:
        _show_root(call, snapshotter, made, why)


def _open(root: str, kind: SnapshotterKind, redirect_dir: bool) -> RecordedSnapshotter:
    from onlap.store import open_snapshotter

    if not redirect_dir:
        return open_snapshotter(root, snapshotter=kind)
    from onlap.overlayfs.markers import TRUSTED
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties

    return OverlaySnapshotter(root, properties=Properties(TRUSTED, redirect_dir=True))


def _show_root(call: Call, snapshotter: RecordedSnapshotter, made: bool, why: str) -> None:
    from onlap.snapshots.overlay import OverlaySnapshotter

    kind, flavour, redirect_dir = "native", None, False
    if isinstance(snapshotter, OverlaySnapshotter):
        kind = "overlay"
        flavour, redirect_dir = snapshotter.properties.flavour, snapshotter.properties.redirect_dir
    details = [f"{flavour} xattrs"] if flavour else []
    details += ["redirect_dir"] if redirect_dir else []
    described = f"{kind} ({', '.join(details)})" if details else kind
    reason = f": {why}" if why and kind != "overlay" else ""
    call.out.show(
        {
            "root": snapshotter.root,
            "created": made,
            "snapshotter": kind,
            "flavour": flavour,
            "redirect_dir": redirect_dir,
            "why": why or None,
        },
        f"{'made' if made else 'found'} {shown(snapshotter.root)}, {described}{reason}",
    )


def df_arguments(parser: Parser) -> None:
    parser.explain(
        "Show what the root holds (snapshots, layers of images, blobs, removed trees, leases), who keeps what, and\n"
        "what onlap cleanup would free. Nothing is walked: what has not been measured counts as nothing, and the last\n"
        "line says so. With --json: one object per thing, with its holders, and one for the filesystem.",
        "onlap df",
        "onlap df --json | jq -r 'select(.type == \"blob\" and .reclaimable) | .name'",
    )


def df(call: Call) -> None:
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
        disk_usage.PARTIAL: "partial blobs",
    }
    rows = [_total(words, [item for item in items if item.type == kind]) for kind, words in named.items()]
    waiting = sum(item.type == disk_usage.TRASH for item in items)
    rows.append(("removed trees", f"{waiting:,}", NOTHING, NOTHING))
    out.table(("WHAT", "COUNT", "SIZE", "RECLAIMABLE"), rows, right=(1, 2, 3))
    held = _by_holder(items)
    if held:
        out.line()
        out.table(("HELD BY", "BLOBS", "LAYERS", "SIZE"), held, right=(1, 2, 3))
    out.line()
    out.line(f"{size(free)} free of {size(total)} at {shown(root)}")
    unknown = sum(item.size is None for item in items if item.type in (disk_usage.SNAPSHOT, disk_usage.LAYER))
    if unknown:
        out.line(f"{count(unknown, 'snapshot is', 'snapshots are')} not measured: see onlap usage")


def _filesystem(root: str) -> tuple[int, int]:
    """The free bytes, and all bytes, of the filesystem that the root is on."""
    with errors.translated("measure the filesystem", key=root):
        found = os.statvfs(root)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _total(words: str, items: Sequence[Item]) -> tuple[str, ...]:
    taken = sum(item.size or 0 for item in items)
    freed = sum(item.size or 0 for item in items if item.reclaimable)
    return words, f"{len(items):,}", size(taken), size(freed)


def _by_holder(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """What each holder keeps by itself; not what a snapshot keeps as a parent, which onlap tree shows."""
    blobs, layers = ("blob", "partial"), ("layer", "snapshot")
    found: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        for holder in item.holders:
            if not holder.startswith("snapshot "):
                found[holder].append(item)
    return [
        (
            shown(holder),
            *(f"{sum(item.type in kinds for item in held):,}" for kinds in (blobs, layers)),
            size(sum(item.size or 0 for item in held if item.type in blobs)),
        )
        for holder, held in sorted(found.items())
    ]


def cleanup_arguments(parser: Parser) -> None:
    parser.explain(
        "Delete what belongs to no snapshot: removed trees, what a crash left behind, the mounts, snapshots and\n"
        "containers of programs that were killed, and blobs that no image needs. A tree that is still mounted or read\n"
        "is kept until it is not. With --manifests also note what committed snapshots hold, where that was not done\n"
        "yet, for onlap check --deep; all of their files are read for it.",
        "onlap cleanup",
    )
    parser.add_argument("--manifests", action="store_true", help="note what committed snapshots hold")


def cleanup(call: Call) -> None:
    out = call.out
    with call.store() as store:
        catalog = store.snapshotter.catalog
        blobs = store.collect()
        deleted = catalog.garbage.cleanup()
        waiting = len(catalog.trash.names())
        noted = catalog.manifests.make_all() if call.args.manifests else 0
        catalog.sidecars.write_all()
    if out.json:
        out.item({"deleted": deleted, "blobs": blobs, "waiting": waiting, "manifests": noted})
        return
    counts = [count(number, word) for number, word in ((deleted, "tree"), (blobs, "blob")) if number]
    out.line(f"deleted {' and '.join(counts)}" if counts else "nothing to delete")
    if noted:
        out.line(f"noted what {count(noted, 'snapshot holds', 'snapshots hold')}")
    if waiting:
        out.warn(f"{count(waiting, 'removed tree is', 'removed trees are')} still mounted or read")


def probe_arguments(parser: Parser) -> None:
    parser.explain(
        "Find out by trial what this kernel, with your privilege, can do in DIR: one line per feature, with the\n"
        "reason for each no, and how a new root there would keep its snapshots. Nothing is left behind.\n\n"
        "features:\n  " + "\n  ".join(" ".join(FEATURES[start : start + 7]) for start in range(0, len(FEATURES), 7)),
        "onlap probe /srv",
        "onlap probe --require overlay && echo yes",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="by default, where the root is or would be")
    parser.repeatable("--require", metavar="F", help="end with 1 unless F works")


def probe(call: Call) -> int:
    from onlap.probing.probe import probe

    out = call.out
    for name in call.args.require:
        if name not in FEATURES:
            raise UsageError(f"there is no feature {shown(name)}; there are: {' '.join(FEATURES)}")
    found = probe(call.args.directory or existing_above(call.root))
    if out.json:
        out.item(_as_json(found))
    else:
        _show_probe(call, found)
    missing = [name for name in call.args.require if not found.features[name].ok]
    for name in missing:
        out.error("Required", f"{name} does not work here: {found.features[name].reason}")
    return exits.NO if missing else exits.DONE


def _show_probe(call: Call, found: Probe) -> None:
    out = call.out
    bug = "with the WAL-reset bug, from which Onlap's own lock protects" if found.sqlite_wal_bug else "sound"
    for name, value in (
        ("directory", shown(found.directory)),
        ("filesystem", f"{found.filesystem}, {size(found.free)} free"),
        ("kernel", found.kernel),
        ("sqlite", f"{found.sqlite}, {bug}"),
        ("a root", f"{_MODES[found.mode]}: {found.why}"),
    ):
        out.line(f"{name:<11} {value}")
    out.line()
    width = max(map(len, FEATURES))
    for name, feature in found.features.items():
        answer = out.paint("yes", "green") if feature.ok else out.paint("no ", "red")
        out.line(f"{name:<{width}}  {answer}  {shown(feature.reason)}".rstrip())


def _as_json(found: Probe) -> dict[str, object]:
    return {
        "directory": found.directory,
        "filesystem": found.filesystem,
        "free": found.free,
        "kernel": found.kernel,
        "sqlite": found.sqlite,
        "sqlite_wal_bug": found.sqlite_wal_bug,
        "mode": found.mode,
        "why": found.why,
        "features": {name: feature._asdict() for name, feature in found.features.items()},
    }
