"""The verbs that read and write the content of snapshots: diff, apply, import and export."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, TypedDict

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.archives import STANDARD_OUTPUT, destination, source_date_epoch
from onlap.cli.shared.changes import show_changes
from onlap.cli.shared.snapshots import as_json, measure
from onlap.cli.terminal.text import amount
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.layers.apply.archive import Applied
    from onlap.layers.diff.write import Written
    from onlap.layers.stream.compression import Compression


def diff_arguments(parser: Parser) -> None:
    parser.explain(
        "Show how the tree of KEY differs from that of its parent, or of any other snapshot with --base. One line per\n"
        "path, as docker diff: A added, C changed (or something in it did), D deleted. With --json also what changed,\n"
        "and the attributes before and after (sizes in bytes, times in nanoseconds). With --tar the difference is\n"
        "written as a layer instead, and its digests are printed.",
        "onlap diff work",
        "onlap diff work --tar layer.tar.gz",
        "onlap diff step-2 --base step-1 --exit-code && echo the same",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.key("--base", metavar="B", help="the snapshot to start from (KEY's parent)")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 if anything differs")
    parser.add_argument("--tar", metavar="FILE", help="write a layer to this file, or - for standard output")
    parser.add_argument("--content", action="store_true", help="with --tar: read files whose attributes are the same")
    _archive_arguments(parser)


def diff(call: Call) -> int:
    args = call.args
    if args.tar is not None:
        if args.exit_code:
            raise UsageError("--exit-code has no meaning with --tar, which writes a layer")
        _write_layer(call)
        return exits.DONE
    for option in ("--compress", "--level", "--sparse", "--content"):
        value = getattr(args, option.lstrip("-"))
        if value is not None and value is not False:
            raise UsageError(f"{option} is for an archive: give its file with --tar")
    with call.store() as store:
        differs = show_changes(call.out, store.diff(args.key, base=args.base)) > 0
    return exits.NO if differs and args.exit_code else exits.DONE


def _write_layer(call: Call) -> None:
    args = call.args
    with call.store() as store, call.progress() as report, destination(args.tar) as file:
        done = store.write_diff(
            args.key, file, base=args.base, content=args.content, progress=report, **_archive_options(args)
        )
    _show_archive(call, args.tar, done)


def apply_arguments(parser: Parser) -> None:
    parser.explain(
        "Apply a layer archive to the active snapshot KEY: a tar, plain or compressed with gzip, zstd, bzip2 or xz.\n"
        "Its whiteouts hide files of the layers below. KEY must not be mounted.",
        "onlap apply work layer.tar.gz",
        "curl -s https://example.org/layer.tar.zst | onlap apply work -",
    )
    parser.key("key", help="the active snapshot")
    parser.add_argument("layer", metavar="LAYER", help="a file, or - for standard input")
    parser.add_argument("--digest", metavar="D", help="the digest that it must have, as sha256:...")
    parser.add_argument("--diff-id", metavar="D", help="the digest that the uncompressed archive must have")
    parser.add_argument("--max-bytes", metavar="N", type=int, help="refuse an archive with more content")
    parser.add_argument("--max-entries", metavar="N", type=int, help="refuse an archive with more entries")
    parser.add_argument("--max-ratio", metavar="N", type=float, help="refuse one that inflates to more than N times")


def apply(call: Call) -> None:
    from onlap.layers.apply.archive import Limits

    args, out = call.args, call.out
    with call.store() as store, call.progress() as report:
        done = store.apply(
            args.key,
            sys.stdin.buffer if args.layer == "-" else args.layer,
            digest=args.digest,
            diff_id=args.diff_id,
            limits=Limits(bytes=args.max_bytes, entries=args.max_entries, ratio=args.max_ratio),
            progress=report,
        )
    out.not_kept(done.skipped)
    line = f"{shown(args.key)}: {amount(done.entries, done.uncompressed)}"
    out.show({"key": args.key, **done._asdict()}, line, *_digests(done))


def import_arguments(parser: Parser) -> None:
    parser.explain(
        "Import a directory as the committed snapshot NAME, with owners, modes, times, xattrs, hard links and holes;\n"
        "content is shared if the filesystem can (reflink). It stays on the source's filesystem. A file that changes\n"
        "while it is read is an error. Or import an archive: a tar, plain or compressed; with a parent its whiteouts\n"
        "apply. The root is made if it does not exist.",
        "onlap import ./project base --exclude .git --exclude '*.o'",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a directory, an archive, or - for an archive on standard input"
    )
    parser.key("name", metavar="NAME", help="the name of the snapshot")
    parser.key("--parent", metavar="P", help="the committed snapshot below it")
    parser.add_argument("--format", choices=("directory", "tar"), help="what the source is, if its name misleads")
    parser.repeatable(
        "--exclude",
        metavar="P",
        help="leave out what matches, with everything below it: * ? [a-z], on the path or the last name",
    )
    parser.add_argument("--allow-changes", action="store_true", help="import files as they are, even if they change")
    parser.labels()


def import_(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True, sweep=True) as store:
        with call.progress() as report:
            done = store.import_(
                sys.stdin.buffer if args.source == "-" else args.source,
                args.name,
                parent=args.parent,
                format=args.format,
                exclude=args.exclude,
                allow_changes=args.allow_changes,
                labels=call.labels,
                progress=report,
            )
        usage = measure(call, store, args.name)
    out.not_kept(done.skipped)
    counts = {"entries": done.entries, "bytes": done.size, "skipped": done.skipped}
    out.show({**as_json(done.info, usage), **counts}, f"{shown(args.name)}: {amount(done.entries, done.size)}")


def export_arguments(parser: Parser) -> None:
    parser.explain(
        "Write the whole tree of a snapshot, including its parents' layers, to a new or empty directory; or as an\n"
        "archive, if the target is -, is a file, or is new and ends in .tar, .tar.gz, .tgz, .tar.zst or .tzst. To\n"
        "write only what a snapshot changed against its parent, use: onlap diff KEY --tar FILE",
        "onlap export step-1 ./out",
        "onlap export step-1 step-1.tar.gz",
        "onlap export step-1 - | tar -t",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("target", metavar="DIR|TAR|-", help="made if it does not exist")
    parser.add_argument("--format", choices=("directory", "tar"), help="what the target is, if its name misleads")
    _archive_arguments(parser)


def export(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(sweep=True) as store, call.progress() as report, destination(args.target) as target:
        done = store.export(args.key, target, format=args.format, progress=report, **_archive_options(args))
    if done.archive is not None:
        _show_archive(call, args.target, done.archive)
        return
    out.not_kept(done.skipped)
    counts = {"entries": done.entries, "bytes": done.size, "skipped": done.skipped}
    out.show(
        {"name": args.key, "directory": os.path.abspath(args.target), **counts},
        f"{shown(args.target)}: {amount(done.entries, done.size)}",
    )


class _ArchiveOptions(TypedDict):
    """How an archive is written."""

    compression: Compression | None
    level: int | None
    epoch: int | None
    sparse: bool


def _archive_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--compress", choices=("none", "gzip", "zstd"), help="of the archive (by the end of its name, else none)"
    )
    parser.add_argument("--level", metavar="N", type=int, help="of the compression")
    parser.add_argument("--sparse", action="store_true", help="leave out holes: for onlap and tar, not for images")


def _archive_options(args: Namespace) -> _ArchiveOptions:
    return {"compression": args.compress, "level": args.level, "epoch": source_date_epoch(), "sparse": args.sparse}


def _show_archive(call: Call, path: str, done: Written) -> None:
    call.out.not_kept(done.skipped)
    if path != STANDARD_OUTPUT:
        line = f"{shown(path)}: {amount(done.entries, done.size)}"
        call.out.show({"file": os.path.abspath(path), **done._asdict()}, line, *_digests(done))


def _digests(done: Applied | Written) -> tuple[str, str]:
    return f"digest   {done.digest}", f"diff ID  {done.diff_id}"
