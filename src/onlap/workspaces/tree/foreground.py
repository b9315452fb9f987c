"""A command in a workspace as the command line runs it: its streams, terminal and signals are those of its caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlap.arguments import StrPath
from onlap.boundary import public
from onlap.snapshots.running.run import Foreground
from onlap.workspaces.tree.running import Isolation, Ran, Task

if TYPE_CHECKING:
    from onlap.workspaces.workspace import Workspace


@public
def run(
    workspace: Workspace,
    argv: Sequence[str],
    foreground: Foreground,
    *,
    isolation: Isolation | None = None,
    cwd: StrPath | None = None,
    timeout: float | None = None,
) -> Ran:
    """As :meth:`Workspace.run`, in the foreground.

    Args:
        workspace: where.
        argv: the command.
        foreground: how it is waited for.
        isolation: see :meth:`Workspace.run`.
        cwd: likewise.
        timeout: likewise; with it, a container reads nothing.

    Raises:
        OnlapError: see :meth:`Workspace.run`; its cause is a :class:`onlap.snapshots.running.run.CannotRun` if the
            command cannot be executed.
    """
    return workspace._carry_out(isolation, Task(argv, cwd, None, timeout, foreground=foreground))
