"""``onlap export``."""

from __future__ import annotations

import os

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.progress import progress, skipped_text
from onlap.cli.text import count, size
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Copy the whole tree of a snapshot, its parents' layers included, into a new or empty directory.",
        "onlap export step-1 ./out",
    )
    parser.key("key", help="a snapshot of any kind")
    parser.add_argument("directory", metavar="DIR", help="made where it does not exist")


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(sweep=True) as store, progress(out) as report:
        done = store.export(args.key, args.directory, progress=report)
    if done.skipped:
        out.warn(f"not kept: {skipped_text(done.skipped)}")
    if out.json:
        thing = {"name": args.key, "directory": os.path.abspath(args.directory)}
        out.item({**thing, "entries": done.entries, "bytes": done.size, "skipped": done.skipped})
    else:
        said = f"{count(done.entries, 'entry', 'entries')}, {size(done.size)}"
        out.line(f"{shown(args.directory)}: {said}")
