"""Context managers that give the tree of a snapshot as a directory: mounted, as scratch space, or to build another.

Each belongs to a run (:mod:`onlap.catalog.runs`): when the program is killed, the next sweep removes its mounts and
snapshots. A child that is forked inside a block and leaves the block changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.arguments import StrPath, check_number, check_path
from onlap.boundary import public
from onlap.errors import shown
from onlap.forks import unless_forked
from onlap.mounts.helper.lazy import Helper, of_root
from onlap.mounts.plan import Mount
from onlap.mounts.userns import may_mount
from onlap.snapshots import exclusion
from onlap.snapshots.recorded import RecordedSnapshotter

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.catalog.runs import Run


@public
@contextlib.contextmanager
def mounted(
    mounts: Mount | Sequence[Mount], at: StrPath | None = None, *, detached: bool = False, timeout: float = 5.0
) -> Iterator[Path]:
    """Mount a plan for the duration of a ``with`` block, and always clean up.

    Without the privilege to mount, a read-write bind yields its own source. Everything else becomes a detached mount,
    which a helper makes in a user namespace.

    Args:
        mounts: the plan, as a snapshotter's ``mounts`` returns it; the first is mounted first.
        at: an existing directory to mount at. By default a directory below the root, or a temporary one if the plan
            belongs to no root.
        detached: attach the mount to no path. The tree is then at ``/proc/<pid>/fd/<n>`` of this process, for this
            process and others of the same user, until the block ends. Nothing is left behind even after SIGKILL.
            ``getcwd()`` fails inside it.
        timeout: how many seconds to wait, at the end, for processes that still use the mount.

    Yields:
        The path of the tree.

    Raises:
        InvalidArgument: it is not a plan.
        NotFound, FailedPrecondition: the snapshot was removed or committed after the plan was made.
        Busy: the snapshot is being committed, removed or applied to. Or, at the end, a process still uses the mount
            (``.holders`` says which), or another mount lies above it; then the next cleanup unmounts it.
        PermissionDenied: mounting is not allowed here, not even in a user namespace.
        OnlapError: of another kind, for an error of the kernel.
    """
    from onlap.catalog.runs import Run, root_of
    from onlap.mounts import temporary

    plan = temporary.check_plan(mounts)
    check_number(timeout, "timeout")
    root = root_of(_layer(plan))
    with contextlib.ExitStack() as stack:
        run = None
        if root is not None:
            stack.enter_context(exclusion.mounting_plan(root, plan))
            run = stack.enter_context(Run(root))
        yield stack.enter_context(
            _mounted_for(run, plan, at, detached, timeout, helper=None if root is None else of_root(root))
        )


def _layer(plan: list[Mount]) -> str:
    """A layer of the plan, which identifies its mount."""
    return plan[0].upper or (plan[0].lowers[0] if plan[0].lowers else plan[0].source)


@contextlib.contextmanager
def _mounted_for(
    run: Run | None,
    plan: list[Mount],
    at: StrPath | None,
    detached: bool,
    timeout: float = 5.0,
    *,
    helper: Helper | None,
) -> Iterator[Path]:
    """Mount where a sweep finds it once the run is dead."""
    from onlap.mounts import temporary

    if run is not None and not detached:
        if at is not None:
            run.mounts_at(os.path.realpath(check_path(at, "mount point")), _layer(plan))
        elif may_mount():
            at = run.tree()
    with temporary.mounted(plan, at, detached=detached, timeout=timeout, helper=helper) as tree:
        yield tree


@contextlib.contextmanager
def mounted_snapshot(
    snapshotter: RecordedSnapshotter,
    key: str,
    at: StrPath | None = None,
    *,
    detached: bool = False,
    reading: bool = False,
) -> Iterator[Path]:
    """See :meth:`onlap.store.Store.mounted`; with ``reading`` the mount is read-only."""
    snapshotter.record(key)  # NotFound comes first
    from onlap.catalog.runs import run_if_writable

    with run_if_writable(snapshotter.catalog) as run:
        # A read-only or full disk has no run, but can still be read: a detached mount ends with the process.
        detached = detached or (run is None and at is None)
        with _mounted(snapshotter, run, key, at, detached, reading) as tree:
            yield tree


@contextlib.contextmanager
def _mounted(
    snapshotter: RecordedSnapshotter,
    run: Run | None,
    key: str,
    at: StrPath | None = None,
    detached: bool = False,
    reading: bool = False,
) -> Iterator[Path]:
    # No mountinfo shows a detached mount, so only a lock keeps its layers from being deleted.
    hidden = detached or not may_mount()
    with contextlib.ExitStack() as stack:
        mounting = exclusion.mounting(snapshotter, snapshotter.record(key), hidden=hidden, reading=reading)
        mounts = stack.enter_context(mounting)
        try:
            tree = stack.enter_context(_mounted_for(run, mounts, at, detached, helper=snapshotter.helper))
        except errors.NotFound as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise snapshotter.missing("mount", key, error.__cause__) from error
            raise
        yield tree


@contextlib.contextmanager
def prepared(snapshotter: RecordedSnapshotter, parent: str | None, what: str) -> Iterator[str]:
    """The key of an active snapshot, which is removed at the end unless it was committed.

    Args:
        snapshotter: of the root.
        parent: the parent of the snapshot.
        what: the purpose, as one word that the key begins with.
    """
    from onlap.catalog.runs import begin

    with begin(snapshotter.catalog) as run, contextlib.ExitStack() as stack:
        yield _prepare(snapshotter, parent, what, run, stack)


def _prepare(
    snapshotter: RecordedSnapshotter, parent: str | None, what: str, run: Run, stack: contextlib.ExitStack
) -> str:
    """The key of a new active snapshot, which the stack removes."""
    key = f"{what}-{run.id}"
    snapshotter.prepare(key, parent, run.labels)
    stack.callback(unless_forked(_drop), snapshotter, key)
    return key


def _drop(snapshotter: RecordedSnapshotter, key: str) -> None:
    with contextlib.suppress(errors.NotFound):  # it was committed, or another process removed it
        snapshotter.remove(key, force=True)


@contextlib.contextmanager
def scratch(snapshotter: RecordedSnapshotter, parent: str | None) -> Iterator[Path]:
    """See :meth:`onlap.store.Store.scratch`."""
    from onlap.catalog.runs import begin

    with begin(snapshotter.catalog) as run, contextlib.ExitStack() as stack:
        key = _prepare(snapshotter, parent, "scratch", run, stack)
        yield stack.enter_context(_mounted(snapshotter, run, key))


@contextlib.contextmanager
def build(
    snapshotter: RecordedSnapshotter, name: str, parent: str | None, labels: Mapping[str, str] | None
) -> Iterator[Path]:
    """See :meth:`onlap.store.Store.build`."""
    from onlap.catalog.runs import begin
    from onlap.mounts import temporary

    snapshotter.check_free(name)
    finished = False
    with begin(snapshotter.catalog) as run, contextlib.ExitStack() as stack:
        key = _prepare(snapshotter, parent, "build", run, stack)
        leave, commit = unless_forked(temporary.await_leaving), unless_forked(snapshotter.commit)
        try:
            with _mounted(snapshotter, run, key) as tree:
                yield tree
                finished = True
            if os.fspath(tree).startswith(f"{snapshotter.catalog.layout.snapshots}/"):
                leave(tree)  # the snapshot's own directory: no unmount has waited for the processes in it
            commit(name, key, labels)
        except BaseException as error:
            if finished and run.keep(snapshotter.catalog):
                # The work is done, and can be committed once the obstacle is gone.
                stack.pop_all()
                _add_hint(error, name, key)
            raise
        stack.pop_all()


def _add_hint(error: BaseException, name: str, key: str) -> None:
    kept = f"what was written is kept as snapshot {shown(key)}"
    do = f"onlap commit {shown(name)} {shown(key)}"
    if isinstance(error, errors.OnlapError):
        error.message = f"cannot finish {shown(name)}: {error.message}; {kept}"
        error.hint = f"{error.hint or 'fix the cause'}; then commit it: {do}"
        error.key = key
    else:
        error.add_note(f"{kept}; commit it with: {do}")
