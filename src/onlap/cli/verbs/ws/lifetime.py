"""Workspaces made, listed and removed: ``onlap ws new``, ``fork``, ``ls`` and ``rm``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.workspaces import checkpoint_text, source_of, workspace_as_json
from onlap.cli.terminal.text import age
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.workspaces.workspace import Workspace


def new_arguments(parser: Parser) -> None:
    parser.explain(
        "Make the workspace NAME: a writable tree that can be checkpointed, rolled back, forked and merged back. A\n"
        "SOURCE with a / in it, or . or .., is a directory; it is captured as it is at one moment, and the next\n"
        "workspace of it copies only what changed since. Any other SOURCE is the name of a committed snapshot or of\n"
        "an image. The root is made if it does not exist.",
        "onlap ws new fix-42 ./repo --exclude '*.o'",
        "onlap ws new trial debian:13",
    )
    parser.add_argument("name", metavar="NAME", help="of the workspace")
    parser.add_argument("source", metavar="SOURCE", help="a directory, a snapshot or an image")
    parser.keys.append("source")
    parser.images.append("source")
    parser.add_argument(
        "--live", action="store_true", help="do not copy the directory; then nothing may write to it meanwhile"
    )
    parser.repeatable(
        "--exclude",
        metavar="P",
        help="of a directory: leave out what matches, and all below it: * ? [a-z], on the path or the last name",
    )


def new(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True) as store:
        source = source_of(store, args.source)
        with call.progress() as report:
            made = store.workspaces.create(args.name, source, exclude=args.exclude, live=args.live, progress=report)
        if out.json:
            out.item(workspace_as_json(made))
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
    parser.add_argument("-n", "--count", metavar="COUNT", type=int, help="make so many, named by numbers")


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
            call.out.show(workspace_as_json(each) if call.out.json else {}, shown(each.name))


def ls_arguments(parser: Parser) -> None:
    parser.explain(
        "List the workspaces: what they were made from, the checkpoint that they stand on and its age, and whether\n"
        "anything was written since.",
        "onlap ws ls",
    )


def ls(call: Call) -> None:
    out = call.out
    now = time.time_ns()

    def row(workspace: Workspace) -> tuple[str, ...]:
        source, at = workspace.source, workspace.at
        changed = "yes" if workspace.is_changed else "no"
        made_from = f"{source.kind} {shown(source.name)}"
        return shown(workspace.name), made_from, checkpoint_text(at), age(at.created_ns, now), changed

    with call.store() as store:
        found = (store.workspaces[name] for name in store.workspaces)
        header = ("NAME", "SOURCE", "AT", "AGE", "CHANGED")
        out.listing(found, workspace_as_json, lambda workspace: workspace.name, header, row, right=(3,))


def rm_arguments(parser: Parser) -> None:
    parser.explain(
        "Remove workspaces, with those of their checkpoints from which no other workspace came. The directory that\n"
        "was captured is not touched. After a failure the next one is tried.",
        "onlap ws rm fix-42 fix-42.1",
    )
    parser.workspace("names", nargs="+", help="the workspaces")


def rm(call: Call) -> int:
    with call.store(sweep=True) as store:

        def remove(name: str) -> None:
            store.workspaces.remove(name)
            call.out.show({"removed": name})

        return call.each(call.args.names, remove)
