"""Commands in a workspace, each on a layer of its own, so that what it changed is known exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from onlap import errors
from onlap.arguments import StrPath
from onlap.errors import shown
from onlap.snapshots.running import Done, run
from onlap.trees.compare import Change
from onlap.workspaces.records import Checkpoint, Source

if TYPE_CHECKING:
    from onlap.workspaces.mounting import Mounting
    from onlap.workspaces.site import Site

Isolation = Literal["none", "namespace", "runtime"]

_CHOICES = ("none", "namespace", "runtime")


class Ran(NamedTuple):
    """How a command in a workspace ended.

    Attributes:
        argv: the command.
        status: its exit status as a shell shows it: 128+N when signal N ended it.
        stdout: what it wrote there, if that was captured.
        stderr: likewise.
        timed_out: whether it was killed since it took too long.
        before: the checkpoint that has the state before it.
        changes: what it changed, sorted by path. A command that ran beside it in the workspace may have done some.
    """

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    before: Checkpoint
    changes: tuple[Change, ...]


def chosen_isolation(isolation: str | None, source: Source) -> str:
    """How a command is isolated, if the caller does not say: an image is a whole system, a directory is a project.

    Raises:
        InvalidArgument: there is no such isolation.
    """
    if isolation is None:
        return "runtime" if source.kind == "image" else "none"
    if isolation not in _CHOICES:
        raise errors.InvalidArgument(f"there is no isolation {shown(isolation)}", hint=", ".join(_CHOICES))
    return isolation


class Task(NamedTuple):
    """A command and how it runs; see :meth:`Workspace.run`."""

    argv: Sequence[str]
    cwd: StrPath | None
    env: Mapping[str, str] | None
    timeout: float | None
    capture: bool
    input: bytes | None


def execute(site: Site, key: str, isolation: str, task: Task, mounting: Mounting | None) -> Done:
    """Run a command in a top, which may be mounted here already."""
    with contextlib.ExitStack() as stack:
        mounted = None
        if mounting is not None:
            stack.enter_context(errors.translated("open the tree", key=mounting.path))
            mounted = stack.enter_context(mounting.opened())
        return run(
            site.snapshotter,
            key,
            task.argv,
            cwd=task.cwd,
            env=task.env,
            timeout=task.timeout,
            capture=task.capture,
            input=task.input,
            chroot=isolation == "namespace",
            mounted=mounted,
        )
