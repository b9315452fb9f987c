"""Commands in a workspace, each on a layer of its own, so that what it changed is known exactly."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from onlap import errors
from onlap.arguments import StrPath, check_path
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.snapshots.running.run import CannotRun, Done, Foreground, check_options, checked_command, run
from onlap.trees.compare import Change
from onlap.workspaces.records import Checkpoint, Source, workspace_of
from onlap.workspaces.tree import limits

if TYPE_CHECKING:
    from onlap.workspaces.site import Site
    from onlap.workspaces.tree.mounting import Mounting

Isolation = Literal["none", "namespace", "runtime"]

_CHOICES: tuple[Isolation, ...] = ("none", "namespace", "runtime")


class Ran(NamedTuple):
    """How a command in a workspace ended.

    Attributes:
        argv: the command.
        status: its exit status as a shell shows it: 128+N when signal N ended it.
        stdout: what it wrote there, if that was captured.
        stderr: likewise.
        timed_out: whether it was killed after its timeout.
        before: the checkpoint that has the state before it.
        changes: what it changed, sorted by path; with what another command changed that ran in the workspace at the
            same time.
    """

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    before: Checkpoint
    changes: tuple[Change, ...]


def chosen_isolation(isolation: str | None, source: Source) -> Isolation:
    """How a command is isolated; by default as its source needs: an image is a whole system, a directory a project.

    Raises:
        InvalidArgument: there is no such isolation.
    """
    if isolation is None:
        return "runtime" if source.kind == "image" else "none"
    for choice in _CHOICES:
        if choice == isolation:
            return choice
    raise errors.InvalidArgument(f"there is no isolation {shown(isolation)}", hint=", ".join(_CHOICES))


class Task(NamedTuple):
    """A command and how it runs; see :meth:`Workspace.run`.

    Attributes:
        added: variables in addition to its environment.
        foreground: run it in the foreground; see :func:`onlap.snapshots.running.run`.
    """

    argv: Sequence[str]
    cwd: StrPath | None
    env: Mapping[str, str] | None
    timeout: float | None
    capture: bool = False
    input: bytes | None = None
    added: Mapping[str, str] = {}
    foreground: Foreground | None = None


def execute(site: Site, top: Record, isolation: Isolation, task: Task, mounting: Mounting | None) -> Done:
    """Run a command in a top, which may be mounted here already."""
    limited = limits.parse(top)
    if limited is not None and (isolation == "runtime" or mounting is not None):
        raise errors.Unimplemented(
            f"the limits of workspace {shown(workspace_of(top.name))} hold neither in a container nor under a mount",
            key=workspace_of(top.name),
            hint="choose another isolation, and end the block that mounted it",
        )
    if isolation == "runtime":
        return _in_container(site, top, task, mounting)
    with contextlib.ExitStack() as stack:
        mounted = None
        if limited is not None:
            mounted = stack.enter_context(limits.enforced(site.snapshotter, top, limited))
        elif mounting is not None:
            stack.enter_context(errors.translated("open the tree", key=mounting.path))
            mounted = stack.enter_context(mounting.opened())
        return run(
            site.snapshotter,
            top.name,
            task.argv,
            cwd=task.cwd,
            env={**os.environ, **task.added} if task.env is None else {**task.env, **task.added},
            timeout=task.timeout,
            capture=task.capture,
            input=task.input,
            chroot=isolation == "namespace",
            mounted=mounted,
            foreground=task.foreground,
        )


def _in_container(site: Site, top: Record, task: Task, mounting: Mounting | None) -> Done:
    from onlap.containers import run as containers
    from onlap.containers.options import Options
    from onlap.containers.runtime import NO_COMMAND

    if mounting is not None:
        raise errors.Busy(
            f"workspace {shown(workspace_of(top.name))} is mounted at {shown(mounting.path)}",
            key=workspace_of(top.name),
            hint="a container mounts it itself: end the block that mounted it first",
            holders=[mounting.path],
        )
    argv = checked_command(task.argv)
    check_options(task.env, task.timeout, task.input)
    directory = None if task.cwd is None else f"/{check_path(task.cwd, 'directory to work in').strip('/')}"
    in_front = task.foreground is not None
    options = Options(
        command=tuple(argv),
        entrypoint=(),
        env={**(task.env or {}), **task.added},
        workdir=directory,
        terminal=in_front and task.timeout is None and os.isatty(0) and os.isatty(1),
    )
    # In the foreground it gets this process's streams; but somebody has to look at the clock.
    attended = None
    if not in_front or task.timeout is not None:
        attended = containers.Attended(task.capture, task.input, task.timeout)
    ended = containers.run(
        site.snapshotter,
        site.container_source(top),
        options,
        attended=attended,
    )
    if ended.problem is not None:
        missing = ended.status == NO_COMMAND
        cause = CannotRun(argv[0], errno.ENOENT if missing else errno.EACCES)
        raise (errors.NotFound if missing else errors.PermissionDenied)(
            f"cannot run {shown(argv[0])}: {ended.problem}", key=argv[0], hint="it is looked for in the workspace"
        ) from cause
    return Done(tuple(argv), ended.status, ended.stdout, ended.stderr, ended.timed_out)
