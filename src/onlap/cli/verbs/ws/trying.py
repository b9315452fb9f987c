"""``onlap try``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.changes import change_as_json, path_of
from onlap.cli.shared.foreground import cannot_run, command_or_shell
from onlap.cli.shared.patches import write_patch
from onlap.cli.terminal.output import complain
from onlap.cli.terminal.text import count
from onlap.cli.verbs.ws.changes import show_conflicts
from onlap.cli.verbs.ws.running import run_in
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.workspaces.merge.entries import Merged
    from onlap.workspaces.tree.running import Ran
    from onlap.workspaces.workspace import Workspace


def try_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in a copy of the current directory, which costs almost nothing where the filesystem has reflinks;\n"
        "show what it changed there, and ask whether to apply that to the directory. Nothing else is isolated: CMD\n"
        "has your files, processes and network. Without a terminal, and without --yes or --no, nothing is applied.\n"
        "If somebody changed the same paths in the meantime, nothing is applied either, and the copy is kept as a\n"
        "workspace. Without CMD it is a shell.\n\n"
        "What was changed goes to standard error. With --json it goes to standard output, one object per change and\n"
        "one for the end, and the output of CMD to standard error.\n\n"
        "The exit status is CMD's; else 125 when onlap fails, 126 when CMD cannot be run, 127 when it does not\n"
        "exist.",
        "onlap try -- npm install left-pad",
        "onlap try --yes -- make format",
        "onlap try --keep refactoring -- ./rename.sh && onlap ws diff refactoring base --patch",
    )
    parser.add_argument("--yes", action="store_true", help="apply the changes without asking, whatever CMD's status")
    parser.add_argument("--no", action="store_true", help="discard the changes without asking")
    parser.add_argument("--patch", action="store_true", help="show the changes as a unified diff")
    parser.add_argument("--keep", metavar="NAME", help="keep the copy as the workspace NAME, without asking")
    parser.repeatable(
        "--exclude",
        metavar="P",
        help="leave out what matches, and all below it: * ? [a-z], on the path or the last name",
    )
    parser.command()


def try_(call: Call) -> int:
    args = call.args
    if args.yes and args.no:
        raise UsageError("--yes and --no exclude each other")
    if args.patch and args.json:
        raise UsageError("--patch is text: omit --json")
    with call.store(create=True, sweep=True) as store:
        from pathlib import Path

        with call.progress() as report:
            made = store.workspaces.create(args.keep, Path("."), exclude=args.exclude, progress=report)
        with made as workspace:
            stdio = (0, 2, 2) if call.out.json else (0, 1, 2)
            try:
                ran = run_in(call, workspace, command_or_shell(args.command), stdio=stdio)
            except errors.OnlapError as error:
                return cannot_run(call.out, error)
            return _Trial(call, workspace, ran).decide()


class _Trial:
    """What a command did to a copy of a directory, and what becomes of it."""

    def __init__(self, call: Call, workspace: Workspace, ran: Ran) -> None:
        self._call = call
        self._out = call.out
        self._workspace = workspace
        self._ran = ran

    def decide(self) -> int:
        """Show the changes, and apply them, keep them or drop them; the exit status."""
        args, ran = self._call.args, self._ran
        self._show()
        status, merged, kept = ran.status, None, args.keep
        if not ran.changes:
            self._say("nothing changed")
        elif args.yes or (not args.no and args.keep is None and self._asked()):
            merged, kept = self._apply()
            status = status if merged is not None else exits.RUN_FAILED
        elif kept is not None:
            self._say(f"kept as workspace {shown(kept)}: onlap ws merge {shown(kept)}")
        if self._out.json:
            applied = merged.applied if merged is not None else 0
            self._out.item({"status": ran.status, "applied": applied, "workspace": kept})
        return status

    def _show(self) -> None:
        if self._out.json:
            for change in self._ran.changes:
                self._out.item(change_as_json(change))
        elif self._call.args.patch:
            self._show_patch()
        elif not self._out.quiet:
            for change in self._ran.changes:
                complain(f"{change.kind} {shown(path_of(change))}")

    def _show_patch(self) -> None:
        before = self._ran.before
        write_patch(sys.stderr, lambda out: self._workspace.patch(out, before))

    def _say(self, text: str) -> None:
        if not self._out.json:
            self._out.report({}, text)

    def _asked(self) -> bool:
        """Whether the user wants the changes."""
        ends = (sys.stdin, sys.stderr)
        if self._out.json or not all(stream is not None and stream.isatty() for stream in ends):
            self._say("nothing was applied: give --yes to apply, --keep NAME to keep the copy, --no for neither")
            return False
        ended = f" (it ended with {self._ran.status})" if self._ran.status else ""
        while True:
            sys.stderr.write(f"onlap: apply {count(len(self._ran.changes), 'change')}{ended}? [y/N/d for the diff] ")
            sys.stderr.flush()
            answer = sys.stdin.buffer.readline().strip().lower()
            if answer in (b"d", b"diff"):
                self._show_patch()
            else:
                return answer in (b"y", b"yes")

    def _apply(self) -> tuple[Merged | None, str | None]:
        """Merge; the copy is kept if that fails. What was merged, and the name of the workspace that stays."""
        workspace, keep = self._workspace, self._call.args.keep
        try:
            plan = workspace.merge_plan()
            if not plan.conflicts:
                merged = workspace.merge()
                self._say(f"applied {count(merged.applied, 'change')} to {shown(plan.target)}")
                return merged, keep
            show_conflicts(self._out, plan)
        except errors.OnlapError as error:
            self._out.onlap_error(error)
        if keep is None:
            keep = workspace.fork(f"try-{os.urandom(3).hex()}").name
        self._out.warn(
            f"nothing was lost: the copy is kept as workspace {shown(keep)}; see: onlap ws diff {shown(keep)} base"
        )
        return None, keep
