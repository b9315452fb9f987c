"""Work in a snapshot's tree for the time of a ``with`` block: mounted, as a scratch copy, or to make another of it.

Everything here belongs to a run (:mod:`onlap.catalog.runs`): when the program is killed, the next sweep takes its
mounts and its snapshots away. A child that is forked in a block and leaves it changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onlap import errors
from onlap.arguments import check_number, check_path
from onlap.boundary import public
from onlap.catalog.runs import Run, begin, begun, root_of
from onlap.errors import shown
from onlap.forks import unless_forked
from onlap.mounts import temporary
from onlap.mounts.plan import Mount
from onlap.mounts.temporary import may_mount
from onlap.snapshots import exclusion
from onlap.snapshots.recorded import RecordedSnapshotter

if TYPE_CHECKING:
    from pathlib import Path

StrPath = str | os.PathLike[str]


@public
@contextlib.contextmanager
def mounted(
    mounts: Mount | Sequence[Mount], at: StrPath | None = None, *, detached: bool = False, timeout: float = 5.0
) -> Iterator[Path]:
    """Mount a plan for the time of a ``with`` block, and always clean up.

    Without the privilege to mount, a read-write bind is its own source, and everything else becomes a detached mount
    that a helper in a user namespace makes.

    Args:
        mounts: the plan, as a snapshotter's ``mounts`` gives it; the first is mounted first.
        at: an existing directory to mount at; by default one below the root, or a temporary one where the plan is not
            of a root.
        detached: mount it nowhere: the path is ``/proc/<pid>/fd/<n>`` of this process, which sees it as long as the
            block runs, as do other processes of the same user. Nothing is left behind even by SIGKILL. ``getcwd()``
            fails inside it.
        timeout: how many seconds to wait at the end for those who still use it.

    Yields:
        Where the tree is.

    Raises:
        InvalidArgument: it is not a plan.
        NotFound, FailedPrecondition: the snapshot was removed, or committed, since its plan was given.
        Busy: it is being committed, removed or applied to; or, at the end, somebody still used it: ``.holders`` says
            who, and the mount is left to the next cleanup, as is one that another is mounted above.
        PermissionDenied: mounting is not allowed here, not even in a user namespace.
        OnlapError: of another kind, for what the kernel says.
    """
    plan = temporary.check_plan(mounts)
    check_number(timeout, "timeout")
    root = root_of(_layer(plan))
    with contextlib.ExitStack() as stack:
        run = None
        if root is not None:
            stack.enter_context(exclusion.mounting_plan(root, plan))
            run = stack.enter_context(Run(root))
        yield stack.enter_context(_placed(run, plan, at, detached, timeout))


def _layer(plan: list[Mount]) -> str:
    """A layer of the plan, by which its mount is known again."""
    return plan[0].upper or (plan[0].lowers[0] if plan[0].lowers else plan[0].source)


@contextlib.contextmanager
def _placed(
    run: Run | None, plan: list[Mount], at: StrPath | None, detached: bool, timeout: float = 5.0
) -> Iterator[Path]:
    """Mount where whoever sweeps behind a dead run will find it."""
    if run is not None and not detached:
        if at is not None:
            run.mounts_at(os.path.realpath(check_path(at, "mount point")), _layer(plan))
        elif may_mount():
            at = run.tree()
    with temporary.mounted(plan, at, detached=detached, timeout=timeout) as tree:
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
    """See :meth:`onlap.store.Store.mounted`; with ``reading`` it is not to be written to."""
    snapshotter.record(key)  # NotFound comes first
    with begun(snapshotter.catalog) as run:
        # On a read-only or full disk what is there can still be read. A detached mount ends with the process.
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
    # A detached mount shows in no mountinfo, so that only a lock keeps its layers from being deleted.
    hidden = detached or not may_mount()
    with contextlib.ExitStack() as stack:
        mounting = exclusion.mounting(snapshotter, snapshotter.record(key), hidden=hidden, reading=reading)
        mounts = stack.enter_context(mounting)
        try:
            tree = stack.enter_context(_placed(run, mounts, at, detached))
        except errors.NotFound as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise snapshotter.missing("mount", key, error.__cause__) from error
            raise
        yield tree


@contextlib.contextmanager
def prepared(snapshotter: RecordedSnapshotter, parent: str | None, what: str) -> Iterator[str]:
    """The key of an active snapshot, removed at the end unless it was committed.

    Args:
        snapshotter: of the root.
        parent: what it stands on.
        what: what for, in one word that its key begins with.
    """
    with begin(snapshotter.catalog) as run, _prepared(snapshotter, parent, what, run) as key:
        yield key


@contextlib.contextmanager
def _prepared(snapshotter: RecordedSnapshotter, parent: str | None, what: str, run: Run) -> Iterator[str]:
    key = f"{what}-{run.id}"
    snapshotter.prepare(key, parent, run.labels)
    with contextlib.ExitStack() as stack:
        stack.callback(unless_forked(_drop), snapshotter, key)
        yield key


def _drop(snapshotter: RecordedSnapshotter, key: str) -> None:
    with contextlib.suppress(errors.NotFound):  # it was committed, or removed by others
        snapshotter.remove(key, force=True)


@contextlib.contextmanager
def scratch(snapshotter: RecordedSnapshotter, parent: str | None) -> Iterator[Path]:
    """See :meth:`onlap.store.Store.scratch`."""
    with (
        begin(snapshotter.catalog) as run,
        _prepared(snapshotter, parent, "scratch", run) as key,
        _mounted(snapshotter, run, key) as tree,
    ):
        yield tree


@contextlib.contextmanager
def build(
    snapshotter: RecordedSnapshotter, name: str, parent: str | None, labels: Mapping[str, str] | None
) -> Iterator[Path]:
    """See :meth:`onlap.store.Store.build`."""
    snapshotter.check_free(name)
    finished = False
    with begin(snapshotter.catalog) as run, contextlib.ExitStack() as dropped:
        key = f"build-{run.id}"
        snapshotter.prepare(key, parent, run.labels)
        dropped.callback(unless_forked(_drop), snapshotter, key)
        leave, commit = unless_forked(temporary.await_leaving), unless_forked(snapshotter.commit)
        try:
            with _mounted(snapshotter, run, key) as tree:
                yield tree
                finished = True
            if os.fspath(tree).startswith(f"{snapshotter.catalog.layout.snapshots}/"):
                leave(tree)  # its own directory, whose end as a mount did not wait for anybody
            commit(name, key, labels)
        except BaseException as error:
            if finished and run.keep(snapshotter.catalog):
                # The work is done, and can be committed once what was in the way is gone.
                dropped.pop_all()
                _tell(error, name, key)
            raise
        dropped.pop_all()


def _tell(error: BaseException, name: str, key: str) -> None:
    kept = f"what was written is kept as snapshot {shown(key)}"
    do = f"onlap commit {shown(name)} {shown(key)}"
    if isinstance(error, errors.OnlapError):
        error.message = f"cannot finish {shown(name)}: {error.message}; {kept}"
        error.hint = f"{error.hint or 'mend that'}; then commit it: {do}"
        error.key = key
    else:
        error.add_note(f"{kept}; commit it with: {do}")
