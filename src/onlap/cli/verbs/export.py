"""``onlap export``."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, cast

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import STANDARD_OUTPUT, archive_arguments, check_no_archive, write
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import amount
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.layers.diff.write import Written
    from onlap.store import Imported

_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.(gz|zst|zstd))$")


def arguments(parser: Parser) -> None:
    parser.explain(
        "Copy the whole tree of a snapshot, its parents' layers included, into a new or empty directory; or write it\n"
        "as an archive, when the target is -, is a file, or ends in .tar, .tgz, .tar.gz or .tar.zst.",
        "onlap export step-1 ./out",
        "onlap export step-1 step-1.tar.gz --compress gzip",
        "onlap export step-1 - | tar -t",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("target", metavar="DIR|TAR|-", help="made where it does not exist")
    parser.add_argument("--layer", action="store_true", help="to an archive: only what it changed against its parent")
    archive_arguments(parser, None)


def run(call: Call) -> None:
    args = call.args
    if args.target == STANDARD_OUTPUT or os.path.isfile(args.target) or _ARCHIVE.search(args.target):
        write(
            call,
            args.target,
            lambda store, out, options: cast("Written", store.export(args.key, out, layer=args.layer, **options)),
        )
    else:
        check_no_archive(call, "give a target that ends in .tar, or -", "--layer")
        _directory(call)


def _directory(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(sweep=True) as store, progress(out) as report:
        done = cast("Imported", store.export(args.key, args.target, progress=report))
    out.not_kept(done.skipped)
    thing = {"name": args.key, "directory": os.path.abspath(args.target)}
    thing |= {"entries": done.entries, "bytes": done.size, "skipped": done.skipped}
    out.say(thing, f"{shown(args.target)}: {amount(done.entries, done.size)}")
