"""``onlap import``."""

from __future__ import annotations

import sys

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.things import as_json
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import amount
from onlap.cli.verbs.commit import note_usage
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Take a directory in, as the committed snapshot NAME, with owners, modes, times, xattrs, hard links and\n"
        "holes; content is shared where the filesystem can (reflink). It stays on the source's filesystem. A file\n"
        "that changes while it is read is an error. Or take an archive: a tar, plain or compressed; over a parent its\n"
        "whiteouts count. The root is made where there is none.",
        "onlap import ./project base --exclude .git --exclude '*.o'",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a directory, an archive, or - for an archive on standard input"
    )
    parser.key("name", metavar="NAME", help="what to call it")
    parser.key("--parent", metavar="P", help="a committed snapshot that it is laid over")
    parser.add_argument("--format", choices=("directory", "tar"), help="what the source is, if its name misleads")
    parser.add_argument(
        "--exclude",
        metavar="P",
        action="append",
        default=[],
        help="leave out what matches, with all below it: * ? [a-z], on the path or the last name; repeatable",
    )
    parser.add_argument("--allow-changes", action="store_true", help="take files as they are, though they change")
    parser.labels()


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True, sweep=True) as store:
        with progress(out) as report:
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
        taken = note_usage(call, store, args.name)
    out.not_kept(done.skipped)
    thing = {"entries": done.entries, "bytes": done.size, "skipped": done.skipped}
    out.say({**as_json(done.info, taken), **thing}, f"{shown(args.name)}: {amount(done.entries, done.size)}")
