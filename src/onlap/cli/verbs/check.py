"""``onlap check``."""

from __future__ import annotations

from functools import partial

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.amounts import byte_count
from onlap.cli.shared.findings import show_findings, verdict
from onlap.cli.shared.images import registry_access, registry_arguments
from onlap.cli.terminal.text import count, size
from onlap.errors import shown


def check_arguments(parser: Parser) -> None:
    parser.explain(
        "Compare what the root holds with what it should hold: records, trees, pins, mounts, images. With --deep also\n"
        "read every file of the committed snapshots, and every blob. One line per finding; the status is 1 when\n"
        "something is wrong. A deep check that was cut short says how to continue it. Nothing is changed without\n"
        "--repair. Damaged files then come from the layer's blob or another layer, while programs use the tree. What\n"
        "is taken out of a tree is kept in snapshots/ID/about/damaged. A catalog that cannot be opened is rebuilt\n"
        "from the records beside the trees. With --repair the status is 1 when something remains.\n\n"
        "--store looks at another program's store instead: a containerd root, a data root of Docker (overlay2), or a\n"
        "root of containers/storage (Podman, Buildah, CRI-O). It reads all layers, with the daemon running or not.\n"
        "--repair then shows what it would do, asks on a terminal, and refills the files of images' layers from the\n"
        "sources that are given. It never touches what a container wrote.",
        "onlap check",
        "onlap check --deep --rate 50M --max-duration 600",
        "onlap check --deep --repair --from-registry",
        "onlap check --store /var/lib/docker",
        "onlap check --store /var/lib/containerd --repair --from-content",
    )
    parser.add_argument("--deep", action="store_true", help="read all content")
    parser.add_argument("--max-duration", metavar="SECONDS", type=float, help="stop a deep check after so long")
    parser.add_argument("--rate", metavar="BYTES", help="read at most so many bytes per second; 50M is 50 MiB")
    parser.add_argument("--after", metavar="PLACE", help="continue a deep check where an earlier one stopped")
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")
    parser.add_argument("--from-registry", action="store_true", help="with --repair: fetch what is nowhere else")
    parser.add_argument("--store", metavar="DIR", help="check another program's store")
    parser.add_argument(
        "--image-store",
        metavar="DIR",
        action="append",
        help="with --store: an additional image store of Podman's, on whose layers others stand",
    )
    parser.add_argument("--driver", metavar="D", help="with --store: the driver of a Docker data root that has several")
    parser.add_argument(
        "--from-content",
        metavar="DIR",
        nargs="?",
        const="",
        action="append",
        help="with --store and --repair: take blobs from the store itself, or from another containerd root",
    )
    parser.add_argument(
        "--from-archive",
        metavar="FILE",
        action="append",
        help="with --store and --repair: take layers from an archive of images, or an OCI layout",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --store and --repair: only show what would be done"
    )
    parser.add_argument("--yes", action="store_true", help="with --store and --repair: do not ask")
    parser.add_argument("--quarantine", action="store_true", help="with --repair: set trees aside that stay damaged")
    registry_arguments(parser)


def check(call: Call) -> int:
    from onlap.check.check import Check
    from onlap.check.repair import Repair

    args, out = call.args, call.out
    if args.store is not None:
        from onlap.cli.verbs.check_store import check_store

        return check_store(call)
    for name in ("driver", "image_store", "from_content", "from_archive", "dry_run", "yes"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is for another program's store: give --store DIR")
    deep = args.deep or args.after is not None
    if not deep and (args.max_duration is not None or args.rate is not None):
        raise UsageError("--max-duration and --rate are for a deep check: give --deep")
    if not args.repair and (args.from_registry or args.quarantine):
        raise UsageError("--from-registry and --quarantine are for a repair: give --repair")
    if args.repair:
        _rebuild(call)
    advice: list[str] = []
    with call.store() as store, call.progress() as report:
        checking = Check(
            store.snapshotter,
            store.content,
            deep=deep,
            after=args.after,
            max_duration=args.max_duration,
            rate=None if args.rate is None else byte_count(args.rate, "--rate"),
            progress=report,
        )
        done = checking.report(show_findings(out, checking.findings()))
        if args.repair:
            repairing = Repair(
                store.snapshotter,
                store.content,
                quarantine=args.quarantine,
                fetch=partial(store.images.refetch, access=registry_access(call)) if args.from_registry else None,
            )
            for finding, what in repairing.run(done.findings):
                if out.json:
                    out.item({"repair": finding._asdict(), "done": what})
                else:
                    out.line(f"repair: {finding.kind}: {finding.place}: {what}")
            done, advice = done.after_repair(done.findings, repairing.left), repairing.advice()
    if out.json:
        if args.repair:
            for finding in done.left:
                out.item({"left": finding._asdict()})
        summary = done._asdict()
        del summary["findings"], summary["repaired"]
        repaired = {"repaired": len(done.repaired), "remedies": advice} if args.repair else {}
        out.item({"checked": summary, "ok": done.ok, **repaired})
    else:
        read = f", {count(done.files, 'file')}, {count(done.blobs, 'blob')}, {size(done.size)}" if deep else ""
        out.line(f"checked {count(done.snapshots, 'snapshot')}{read}: {verdict(done.findings)}")
        if args.repair:
            out.line(f"repaired {len(done.repaired)}, left {len(done.left)}")
            for finding in done.left:
                out.line(f"left: {finding}")
        else:
            advice = list(dict.fromkeys(each.remedy for each in done.left))
        for remedy in advice:
            out.line(f"to repair it: {remedy}")
        if done.unlisted:
            have = count(done.unlisted, "snapshot has", "snapshots have")
            out.line(f"{have} no manifest to compare with; make it with: onlap cleanup --manifests")
        if done.after is not None:
            out.line(f"stopped early; continue with: onlap check --deep --after {shown(done.after)}")
    return exits.DONE if done.ok else exits.NO


def _rebuild(call: Call) -> None:
    """Rebuild a catalog that cannot be opened."""
    from onlap.check.rebuild import rebuild
    from onlap.store import open

    check_access(call.root)
    try:
        open(call.root, create=False).close()
        return
    except errors.DataLoss as error:
        # Not after an error of the disk (SQLITE_IOERR), behind which the catalog may be whole.
        if "onlap check --repair" not in (error.hint or ""):
            raise
        why = error.message
    done = rebuild(call.root)
    if call.out.json:
        call.out.item({"rebuilt": done._asdict(), "why": why})
        return
    call.out.line(f"error: {why}")
    call.out.line(f"rebuilt the catalog: {count(done.snapshots, 'snapshot')}, {count(done.images, 'image')}")
    for name in done.kept:
        call.out.line(f"kept: {name}")
    for name in done.unrecorded:
        call.out.line(f"left without a record: {name}")
