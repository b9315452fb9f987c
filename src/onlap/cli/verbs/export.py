"""``onlap export``."""

from __future__ import annotations

import os

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import archive_arguments, archive_options, say_archive, target
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import amount
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Write the whole tree of a snapshot, its parents' layers included, into a new or empty directory; or as an\n"
        "archive, when the target is -, is a file, or is new and ends in .tar, .tar.gz, .tgz, .tar.zst or .tzst.\n"
        "What a snapshot changed against its parent is written by: onlap diff KEY --tar FILE",
        "onlap export step-1 ./out",
        "onlap export step-1 step-1.tar.gz",
        "onlap export step-1 - | tar -t",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("target", metavar="DIR|TAR|-", help="made where it does not exist")
    parser.add_argument("--format", choices=("directory", "tar"), help="what the target is, if its name misleads")
    archive_arguments(parser)


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(sweep=True) as store, progress(out) as report, target(args.target) as to:
        done = store.export(args.key, to, format=args.format, progress=report, **archive_options(args))
    out.not_kept(done.skipped)
    if done.archive is not None:
        say_archive(call, args.target, done.archive)
    else:
        thing = {"name": args.key, "directory": os.path.abspath(args.target)}
        thing |= {"entries": done.entries, "bytes": done.size, "skipped": done.skipped}
        out.say(thing, f"{shown(args.target)}: {amount(done.entries, done.size)}")
