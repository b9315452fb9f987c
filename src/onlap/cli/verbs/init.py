"""``onlap init``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser, UsageError
from onlap.errors import shown
from onlap.probing.probe import existing_above, overlay_mode

if TYPE_CHECKING:
    from onlap.snapshots.recorded import RecordedSnapshotter
    from onlap.store import SnapshotterKind


def arguments(parser: Parser) -> None:
    parser.explain(
        "Make a root, where snapshots are kept, or say what the one that is there is. What is chosen here is fixed\n"
        'for the root\'s life. "auto" takes overlay where that can be mounted (see: onlap probe), and native copies\n'
        "elsewhere; prepare and import make a root likewise.",
        "onlap init",
        "onlap --root /srv/snapshots init --snapshotter native",
    )
    parser.add_argument(
        "--snapshotter", choices=("auto", "overlay", "native"), default="auto", help="how to keep them (auto)"
    )
    parser.add_argument(
        "--redirect-dir",
        action="store_true",
        help="let directories of lower layers be renamed; containerd and Docker cannot read such layers",
    )


def run(call: Call) -> None:
    root, args = call.root, call.args
    if args.redirect_dir and args.snapshotter == "native":
        raise UsageError("--redirect-dir is for overlays")
    check_access(root, create=True)
    made = not os.path.lexists(os.path.join(root, "catalog.db"))
    why = ""
    if made and args.snapshotter != "native":
        mode, why = overlay_mode(existing_above(root))
        if args.snapshotter == "overlay" and mode == "native":
            call.out.warn(f"{why}; the root is made all the same, for a place where overlays work")
    with _open(root, args.snapshotter, args.redirect_dir) as snapshotter:
        _show(call, snapshotter, made, why)


def _open(root: str, kind: SnapshotterKind, redirect_dir: bool) -> RecordedSnapshotter:
    from onlap.store import open_snapshotter

    if not redirect_dir:
        return open_snapshotter(root, snapshotter=kind)
    from onlap.overlayfs.markers import TRUSTED
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties

    return OverlaySnapshotter(root, properties=Properties(TRUSTED, redirect_dir=True))


def _show(call: Call, snapshotter: RecordedSnapshotter, made: bool, why: str) -> None:
    from onlap.snapshots.overlay import OverlaySnapshotter

    kind, flavour, redirect_dir = "native", None, False
    if isinstance(snapshotter, OverlaySnapshotter):
        kind = "overlay"
        flavour, redirect_dir = snapshotter.properties.flavour, snapshotter.properties.redirect_dir
    if call.out.json:
        thing = {"root": snapshotter.root, "created": made, "snapshotter": kind, "flavour": flavour}
        call.out.item({**thing, "redirect_dir": redirect_dir, "why": why or None})
        return
    details = [f"{flavour} xattrs"] if flavour else []
    details += ["redirect_dir"] if redirect_dir else []
    said = f"{kind} ({', '.join(details)})" if details else kind
    reason = f": {why}" if why and kind != "overlay" else ""
    call.out.line(f"{'made' if made else 'there is'} {shown(snapshotter.root)}, {said}{reason}")
