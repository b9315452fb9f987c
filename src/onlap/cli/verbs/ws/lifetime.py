"""Workspaces made, listed and removed: ``onlap ws new``, ``fork``, ``ls`` and ``rm``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.amounts import byte_count
from onlap.cli.shared.workspaces import Listed, checkpoint_text, listed, listed_as_json, source_of
from onlap.cli.terminal.text import age
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.store import Store


def new_arguments(parser: Parser) -> None:
    parser.explain(
        "Make the workspace NAME: a writable tree that can be checkpointed, rolled back, forked and merged back.\n"
        "SOURCE is the name of a committed snapshot or of an image; or a directory, if it is . or .., begins with /,\n"
        "./ or ../, or has a / in it and is no such name. A directory is captured as it is at one moment, and the\n"
        "next workspace of it copies only what has changed. The root is made if it does not exist.",
        "onlap ws new fix-42 ./repo --exclude '*.o'",
        "onlap ws new trial debian:13",
    )
    parser.add_argument("name", metavar="NAME", help="the name of the workspace")
    parser.add_argument("source", metavar="SOURCE", help="a directory, a snapshot or an image")
    parser.keys.append("source")
    parser.images.append("source")
    parser.add_argument(
        "--live", action="store_true", help="use the directory itself, not a copy; then nothing may write to it"
    )
    parser.add_argument(
        "--max-bytes", metavar="N", help="limit what one command may write, kept in memory (50M: 50 MiB)"
    )
    parser.add_argument("--max-inodes", metavar="N", type=int, help="limit how many files and directories it may make")
    parser.repeatable(
        "--exclude",
        metavar="P",
        help="of a directory: leave out what matches, and all below it: * ? [a-z], on the path or the last name",
    )


def new(call: Call) -> None:
    args, out = call.args, call.out
    max_bytes = None if args.max_bytes is None else int(byte_count(args.max_bytes, "--max-bytes"))
    with call.store(create=True) as store:
        source = source_of(store, args.source)
        with call.progress() as report:
            made = store.workspaces.create(
                args.name,
                source,
                exclude=args.exclude,
                live=args.live,
                max_bytes=max_bytes,
                max_inodes=args.max_inodes,
                progress=report,
            )
        if out.json:
            out.item(listed_as_json(listed(made)))
    out.note(f"{shown(args.name)} is ready: onlap ws run {shown(args.name)} -- CMD")


def fork_arguments(parser: Parser) -> None:
    parser.explain(
        "Make another workspace with the tree and the history of NAME, and print its name. What is written in one\n"
        "is not seen in the other. The present state of NAME becomes a checkpoint, unless --at says where to begin.",
        "onlap ws fork fix-42 other-way --at green",
        "onlap ws fork fix-42 -n 20",
    )
    parser.workspace("name", help="the workspace")
    parser.add_argument("new", nargs="?", metavar="NEW", help="the name of the fork (NAME with a number)")
    parser.checkpoint("--at", metavar="C", help="the checkpoint to begin at")
    parser.add_argument("-n", "--count", metavar="COUNT", type=int, help="make this many, with numbers as names")


def fork(call: Call) -> None:
    args = call.args
    if args.new is not None and args.count is not None:
        raise UsageError("NEW is for one fork; --count gives names by itself")
    with call.store() as store:
        workspace = store.workspaces[args.name]
        if args.count is not None:
            made = workspace.forks(args.count, at=args.at)
        else:
            made = [workspace.fork(args.new, at=args.at)]
        for each in made:
            call.out.show(listed_as_json(listed(each)) if call.out.json else {}, shown(each.name))


def ls_arguments(parser: Parser) -> None:
    parser.explain(
        "List the workspaces: what they were made from, the checkpoint that they stand on and its age, and whether\n"
        "anything was written since.",
        "onlap ws ls",
    )


def ls(call: Call) -> None:
    out = call.out
    now = time.time_ns()

    def row(found: Listed) -> tuple[str, ...]:
        changed = "yes" if found.changed else "no"
        made_from = f"{found.source.kind} {shown(found.source.name)}"
        return shown(found.name), made_from, checkpoint_text(found.at), age(found.at.created_ns, now), changed

    with call.store() as store:
        header = ("NAME", "SOURCE", "AT", "AGE", "CHANGED")
        out.listing(_listed(store), listed_as_json, lambda found: found.name, header, row, right=(3,))


def _listed(store: Store) -> Iterator[Listed]:
    for name in store.workspaces:
        with contextlib.suppress(errors.NotFound):  # removed meanwhile
            yield listed(store.workspaces[name])


def rm_arguments(parser: Parser) -> None:
    parser.explain(
        "Remove workspaces, with those of their checkpoints from which no other workspace came. The directory that\n"
        "was captured is not touched. After a failure the next one is tried.",
        "onlap ws rm fix-42 fix-42.1",
    )
    parser.workspace("names", nargs="+", help="the workspaces")


def rm(call: Call) -> int:
    with call.store(sweep=True) as store:
        return call.remove_each(call.args.names, store.workspaces.remove)
