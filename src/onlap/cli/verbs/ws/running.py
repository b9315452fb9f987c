"""Commands in a workspace: ``onlap ws run`` and ``onlap ws shell``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.cli import process
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.changes import path_of, summary
from onlap.cli.shared.foreground import cannot_run, command_or_shell, wait
from onlap.cli.shared.workspaces import seconds
from onlap.errors import shown
from onlap.snapshots.running import CannotRun, started
from onlap.workspaces.records import COMMAND, OWNER, format_command, top_key

if TYPE_CHECKING:
    from onlap.store import Store
    from onlap.trees.compare import Change
    from onlap.workspaces.records import Checkpoint
    from onlap.workspaces.workspace import Workspace

# Paths that the summary names.
_NAMED = 10


class Ended(NamedTuple):
    """How a command in a workspace ended.

    Attributes:
        status: its exit status.
        before: the checkpoint that has the state before it.
        changes: what it changed.
    """

    status: int
    before: Checkpoint
    changes: list[Change]


def run_arguments(parser: Parser) -> None:
    parser.explain(
        "Run CMD in the tree of the workspace NAME, which is its working directory, in a mount namespace of its\n"
        "own. What was written before becomes a checkpoint, so that what CMD changed is known exactly: a summary of\n"
        "it goes to standard error (-q: none; --json: as a JSON object). CMD has your files, processes and network:\n"
        "this is not a sandbox. With --chroot the tree is its root.\n\n"
        "The exit status is CMD's, 137 after a timeout; else 125 when onlap fails, 126 when CMD cannot be run, 127\n"
        "when it does not exist.",
        "onlap ws run fix-42 make test",
        "onlap ws run fix-42 --cwd src --timeout 10m -- ./fix.sh",
    )
    _running_arguments(parser)
    parser.add_argument(
        "--timeout", metavar="TIME", help="kill it and all that it started after this time, as 90 or 5m"
    )
    parser.command("NAME", options_behind=True)


def shell_arguments(parser: Parser) -> None:
    parser.explain(
        "Start your shell (SHELL) in the tree of the workspace NAME, as onlap ws run does with a command.",
        "onlap ws shell fix-42",
    )
    _running_arguments(parser)


def _running_arguments(parser: Parser) -> None:
    parser.workspace("name", help="the workspace")
    parser.add_argument("--cwd", metavar="DIR", help="where in the tree it starts, relative to its top")
    parser.add_argument("--chroot", action="store_true", help="make the tree its root")


def run(call: Call) -> int:
    args = call.args
    return _run(call, args.command, None if args.timeout is None else seconds(args.timeout))


def shell(call: Call) -> int:
    return _run(call, (), None)


def _run(call: Call, command: Sequence[str], timeout: float | None) -> int:
    args, out = call.args, call.out
    with call.store(sweep=True) as store:
        workspace = store.workspaces[args.name]
        words = command_or_shell(command, chroot=args.chroot)
        try:
            ended = run_in(call, store, workspace, words, cwd=args.cwd or "", chroot=args.chroot, timeout=timeout)
        except CannotRun as error:
            return cannot_run(out, error)
        kinds = Counter(change.kind for change in ended.changes)
        lines = [f"  {change.kind} {shown(path_of(change))}" for change in ended.changes[:_NAMED]]
        if len(ended.changes) > _NAMED:
            lines.append(f"  and {len(ended.changes) - _NAMED:,} more: onlap ws diff {shown(args.name)}")
        out.report(
            {"workspace": args.name, "status": ended.status, "before": ended.before.id, "changes": len(ended.changes)},
            f"{shown(args.name)}: {summary(kinds) if ended.changes else 'nothing changed'}",
            *lines,
        )
    return ended.status


def run_in(
    call: Call,
    store: Store,
    workspace: Workspace,
    command: Sequence[str],
    *,
    cwd: str = "",
    chroot: bool = False,
    timeout: float | None = None,
    stdio: Sequence[int] = (0, 1, 2),
) -> Ended:
    """Run a command in the foreground, on a layer of its own.

    Raises:
        CannotRun: it cannot be executed.
    """
    try:
        before = workspace.checkpoint()  # which also finds out whether a power cut took what it stands on
    except errors.Busy:  # another command runs in it: the changes are those since the last checkpoint
        before = workspace.at
    snapshotter = store.snapshotter.for_owner(OWNER)
    key = top_key(workspace.name)
    starting = started(
        snapshotter,
        key,
        command,
        env={**os.environ, "ONLAP_WORKSPACE": workspace.name},
        stdio=stdio,
        cwd=cwd,
        chroot=chroot,
        terminal=True,
        open_files=process.open_files_before(),
    )
    status = wait(call.out, starting, timeout=timeout)
    changes = list(workspace.diff(before))
    if changes:
        snapshotter.label(key, {COMMAND: format_command(command)})
    return Ended(status, before, changes)
