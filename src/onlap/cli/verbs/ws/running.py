"""Commands in a workspace: ``onlap ws run`` and ``onlap ws shell``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.shared.amounts import seconds
from onlap.cli.shared.changes import path_of, summary
from onlap.cli.shared.foreground import cannot_run, command_or_shell, foreground
from onlap.errors import shown
from onlap.workspaces.tree.foreground import run as in_foreground
from onlap.workspaces.tree.running import chosen_isolation

if TYPE_CHECKING:
    from onlap.workspaces.tree.running import Isolation, Ran
    from onlap.workspaces.workspace import Workspace

# Paths that the summary names.
_NAMED = 10


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
    parser.add_argument(
        "--isolation",
        choices=("none", "namespace", "runtime"),
        help="none: the tree is its working directory; namespace: its root; runtime: in a container (runtime for an "
        "image, else none)",
    )
    parser.add_argument("--chroot", action="store_true", help="the same as --isolation namespace")


def run(call: Call) -> int:
    args = call.args
    return _run(call, args.command, None if args.timeout is None else seconds(args.timeout))


def shell(call: Call) -> int:
    return _run(call, (), None)


def _run(call: Call, command: Sequence[str], timeout: float | None) -> int:
    args, out = call.args, call.out
    if args.chroot and args.isolation not in (None, "namespace"):
        raise UsageError("--chroot is --isolation namespace")
    with call.store(sweep=True) as store:
        workspace = store.workspaces[args.name]
        isolation = chosen_isolation("namespace" if args.chroot else args.isolation, workspace.source)
        words = command_or_shell(command, chroot=isolation != "none")
        try:
            ran = run_in(call, workspace, words, isolation=isolation, cwd=args.cwd, timeout=timeout)
        except errors.OnlapError as error:
            return cannot_run(out, error)
        kinds = Counter(change.kind for change in ran.changes)
        lines = [f"  {change.kind} {shown(path_of(change))}" for change in ran.changes[:_NAMED]]
        if len(ran.changes) > _NAMED:
            lines.append(f"  and {len(ran.changes) - _NAMED:,} more: onlap ws diff {shown(args.name)}")
        out.report(
            {"workspace": args.name, "status": ran.status, "before": ran.before.id, "changes": len(ran.changes)},
            f"{shown(args.name)}: {summary(kinds) if ran.changes else 'nothing changed'}",
            *lines,
        )
    return ran.status


def run_in(
    call: Call,
    workspace: Workspace,
    command: Sequence[str],
    *,
    isolation: Isolation | None = None,
    cwd: str | None = None,
    timeout: float | None = None,
    stdio: tuple[int, int, int] = (0, 1, 2),
) -> Ran:
    """Run a command in the foreground, on a layer of its own.

    Raises:
        OnlapError: see :meth:`Workspace.run`; the cause of one for a command that cannot be executed is a CannotRun.
    """
    call.out.flush()
    ran = in_foreground(workspace, command, foreground(stdio), isolation=isolation, cwd=cwd, timeout=timeout)
    if ran.timed_out:
        call.out.warn(f"the command was killed after {timeout:g} s")
    return ran
