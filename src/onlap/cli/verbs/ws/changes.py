"""What a workspace changed, shown and brought back: ``onlap ws diff`` and ``onlap ws merge``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.changes import STYLES, change_as_json, path_of, show_changes
from onlap.cli.shared.patches import write_patch
from onlap.cli.terminal.output import Output
from onlap.cli.terminal.text import count
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.workspaces.merge.entries import MergeEntry, MergePlan
    from onlap.workspaces.workspace import Workspace


def diff_arguments(parser: Parser) -> None:
    parser.explain(
        "Show what was changed in the workspace NAME since the checkpoint that it stands on, or since checkpoint A,\n"
        "or between A and B. One line per path: A added, C changed (or something in it did), D deleted. With\n"
        "--patch as a unified diff of text files, for git apply and patch -p1; binary files are named.",
        "onlap ws diff fix-42",
        "onlap ws diff fix-42 base --patch > fix-42.patch",
    )
    parser.workspace("name", help="the workspace")
    parser.checkpoint("before", nargs="?", metavar="A", help="an id or a name in onlap ws log")
    parser.checkpoint("after", nargs="?", metavar="B", help="likewise (the present state)")
    parser.add_argument("--patch", action="store_true", help="as a unified diff")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if anything differs")


def diff(call: Call) -> int:
    args = call.args
    if args.patch and args.json:
        raise UsageError("--patch is text: omit --json")
    with call.store() as store:
        workspace = store.workspaces[args.name]
        if args.patch:
            differs = args.exit_code and any(True for _ in workspace.diff(args.before, args.after))
            write_patch(sys.stdout, lambda out: workspace.patch(out, args.before, args.after))
        else:
            differs = show_changes(call.out, workspace.diff(args.before, args.after)) > 0
    return exits.NO if differs and args.exit_code else exits.DONE


def merge_arguments(parser: Parser) -> None:
    parser.explain(
        "Bring what the workspace NAME changed since its base back into the directory that was captured, or into\n"
        "TARGET: everything that is selected, or nothing. A path that was changed there meanwhile is a conflict,\n"
        "unless it has become the same. With --plan nothing is done, and one line per path says what would be:\n"
        "apply, same or conflict. A merge that was killed is undone or finished by the next one.",
        "onlap ws merge fix-42 --plan",
        "onlap ws merge fix-42 --select 'src/**' --select README.md",
    )
    parser.workspace("name", help="the workspace")
    parser.add_argument("target", nargs="?", metavar="TARGET", help="a directory")
    parser.repeatable(
        "--select", metavar="GLOB", help="merge only what matches: * within a name, ** across directories"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be done")


def merge(call: Call) -> int:
    args = call.args
    with call.store() as store:
        workspace = store.workspaces[args.name]
        plan = workspace.merge_plan(args.target, select=args.select)
        if args.plan:
            _show_plan(call.out, plan)
        if plan.conflicts:
            show_conflicts(call.out, plan)
            return exits.BY_KIND["FailedPrecondition"]
        if not args.plan:
            merge_and_show(call.out, workspace, plan.target, args.select)
    return exits.DONE


def _show_plan(out: Output, plan: MergePlan) -> None:
    if out.json:
        for entry in plan.entries:
            out.item(_entry_as_json(entry))
        return
    for entry in plan.entries:
        kind = out.paint(entry.change.kind, STYLES[entry.change.kind])
        reason = f" ({entry.reason})" if entry.reason else ""
        out.line(f"{entry.state:<8} {kind} {shown(path_of(entry.change))}{reason}")


def _entry_as_json(entry: MergeEntry) -> dict[str, object]:
    return {"state": entry.state, "reason": entry.reason or None, **change_as_json(entry.change)}


def show_conflicts(out: Output, plan: MergePlan) -> None:
    """Report the conflicts of a merge, one per line."""
    for entry in plan.conflicts:
        out.error(
            "FailedPrecondition",
            f"conflict at {shown(path_of(entry.change))}: {entry.reason}",
            key=entry.path,
        )
    out.error(
        "FailedPrecondition",
        f"nothing was merged into {shown(plan.target)}: {count(len(plan.conflicts), 'conflict')}",
        key=plan.target,
        hint="settle them in the workspace or the target, or select other paths",
    )


def merge_and_show(out: Output, workspace: Workspace, target: str, select: Iterable[str]) -> None:
    """Merge, and say how much."""
    done = workspace.merge(target, select=tuple(select))
    same = f"; {count(done.same, 'was', 'were')} the same already" if done.same else ""
    out.show({"target": target, **done._asdict()}, f"merged {count(done.applied, 'path')} into {shown(target)}{same}")
