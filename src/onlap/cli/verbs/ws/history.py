"""The checkpoints of a workspace: ``onlap ws checkpoint``, ``rollback``, ``log``, ``forget`` and ``keep``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.amounts import seconds
from onlap.cli.shared.workspaces import checkpoint_as_json, checkpoint_text, command_text, in_order
from onlap.cli.terminal.text import NOTHING, age, count, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.workspaces.records import Checkpoint


def checkpoint_arguments(parser: Parser) -> None:
    parser.explain(
        "Keep the present state of the workspace NAME, to go back to or to fork from, and print the checkpoint's\n"
        "id. The time does not depend on the size of the tree. If nothing was written since the last checkpoint, it\n"
        "is that one.",
        "onlap ws checkpoint fix-42 green",
    )
    parser.workspace("name", help="the workspace")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a name for it")
    parser.add_argument("--durable", action="store_true", help="wait until it survives a power cut")
    parser.add_argument(
        "--freeze", action="store_true", help="freeze the programs that run in the tree, instead of failing"
    )
    _wait_argument(parser)


def _wait_argument(parser: Parser) -> None:
    parser.add_argument("--wait", metavar="SECONDS", default="0", help="wait for processes that use the tree (0)")


def checkpoint(call: Call) -> None:
    args = call.args
    wait = seconds(args.wait)
    with call.store() as store:
        made = store.workspaces[args.name].checkpoint(
            args.checkpoint, durable=args.durable, wait=wait, freeze=args.freeze
        )
    call.out.show(checkpoint_as_json(made), made.id)


def rollback_arguments(parser: Parser) -> None:
    parser.explain(
        "Take the workspace NAME back to a checkpoint, by default the last one. What was written since the last\n"
        "checkpoint is discarded; all checkpoints stay.",
        "onlap ws rollback fix-42",
        "onlap ws rollback fix-42 green",
    )
    parser.workspace("name", help="the workspace")
    parser.checkpoint("to", nargs="?", metavar="CHECKPOINT", help="an id or a name in onlap ws log")
    _wait_argument(parser)


def rollback(call: Call) -> None:
    args, out = call.args, call.out
    wait = seconds(args.wait)
    with call.store(sweep=True) as store:
        reached = store.workspaces[args.name].rollback(args.to, wait=wait)
    if out.json:
        out.item(checkpoint_as_json(reached))
    out.note(f"{shown(args.name)} is at {checkpoint_text(reached)}")


def log_arguments(parser: Parser) -> None:
    parser.explain(
        "Show the checkpoints of a workspace, and those that it came from, as a tree, oldest first. CHANGE is how\n"
        "much each one changed. The notes say where the workspace stands, whether something was written since, and\n"
        "what would not survive a power cut yet.",
        "onlap ws log fix-42",
    )
    parser.workspace("name", help="the workspace")


def log(call: Call) -> None:
    out = call.out
    with call.store() as store:
        workspace = store.workspaces[call.args.name]
        checkpoints = workspace.log()
        here, changed = workspace.at.id, workspace.is_changed
    if out.json:
        for each in checkpoints:
            is_here = each.id == here
            out.item({**checkpoint_as_json(each), "here": is_here, "changed": is_here and changed})
        return
    now = time.time_ns()

    def notes(each: Checkpoint) -> str:
        words = ["here"] if each.id == here else []
        words += ["changed since"] if words and changed else []
        words += [] if each.durable else ["not durable yet"]
        return ", ".join(words)

    rows = [
        (
            lines + each.id,
            shown(", ".join(each.names)) or NOTHING,
            age(each.created_ns, now),
            NOTHING if each.size is None else size(each.size),
            notes(each),
            command_text(each.command),
        )
        for each, lines in in_order(checkpoints)
    ]
    out.table(("CHECKPOINT", "NAME", "AGE", "CHANGE", "NOTES", "COMMAND"), rows, right=(2, 3))


def forget_arguments(parser: Parser) -> None:
    parser.explain(
        "Remove checkpoints from the history of the workspace NAME. Their space is freed as soon as nothing stands\n"
        "on them. After a failure the next one is tried.",
        "onlap ws forget fix-42 green",
    )
    parser.workspace("name", help="the workspace")
    parser.checkpoint("checkpoints", nargs="+", metavar="CHECKPOINT", help="ids or names in onlap ws log")


def forget(call: Call) -> int:
    with call.store(sweep=True) as store:
        workspace = store.workspaces[call.args.name]

        def forget_one(text: str) -> None:
            workspace.forget(text)
            call.out.show({"forgotten": text})

        return call.each(call.args.checkpoints, forget_one)


def keep_arguments(parser: Parser) -> None:
    parser.explain(
        "Forget the checkpoints that the workspace NAME made, except the newest, those with a name, and the one that\n"
        "it stands on.",
        "onlap ws keep fix-42 --last 100 --newer-than 2d",
    )
    parser.workspace("name", help="the workspace")
    parser.add_argument("--last", metavar="N", type=int, help="keep this many of the newest")
    parser.add_argument("--newer-than", metavar="AGE", help="keep those that are younger, as 15m, 2h or 7d")
    parser.add_argument("--forget-named", action="store_true", help="forget those with a name too")


def keep(call: Call) -> None:
    args = call.args
    if args.last is None and args.newer_than is None:
        raise UsageError("say what to keep: --last N or --newer-than AGE")
    since = None if args.newer_than is None else seconds(args.newer_than)
    with call.store(sweep=True) as store:
        gone = store.workspaces[args.name].keep(last=args.last, newer_than=since, named=not args.forget_named)
    call.out.show({"forgotten": gone}, f"forgot {count(gone, 'checkpoint')}")
