"""The merge of a workspace's state into a directory, and of later states into the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from sqlite3 import Connection

from onlap import cancellation, errors
from onlap.catalog import records as rows
from onlap.catalog.records import Record
from onlap.snapshots.recorded import Pair
from onlap.snapshots.transfer.directories import check_outside
from onlap.workspaces.history import checkpoints, naming
from onlap.workspaces.merge.apply import apply
from onlap.workspaces.merge.entries import Merged, MergePlan
from onlap.workspaces.merge.plan import plan
from onlap.workspaces.records import BASE_ID, MERGED, OWNER, node_id
from onlap.workspaces.site import Site

# How many merged states are remembered; with each one, a plan compares once more.
_REMEMBERED = 8


def merge(site: Site, top: Record, state: Record, target: str, select: Sequence[str]) -> Merged:
    """Merge a state; see :meth:`Workspace.merge`.

    Args:
        site: of the workspaces.
        top: of the workspace.
        state: the checkpoint to merge.
        target: the directory.
        select: globs of the paths.

    Raises:
        OnlapError: see :meth:`Workspace.merge`.
    """
    with planning(site, top, state, target) as planned:
        made = planned(select)
        # Noted before it is done, and harmless if it is not: what the directory has of it is looked for in any case.
        # But not if it cannot be done: it would displace one that was.
        if node_id(state) != BASE_ID and not made.conflicts:
            cancellation.keep()  # a canceled merge is done all the same
            site.snapshotter.catalog.update(OWNER, top.name, partial(_note, node_id(state)))
        return apply(made, site.snapshotter.layers(state), site.snapshotter.markers)


def _note(identifier: str, connection: Connection, top: Record) -> None:
    """Note that a state was merged; other threads and processes note others meanwhile."""
    earlier = [each for each in top.labels.get(MERGED, "").split() if each != identifier]
    rows.set_labels(connection, top.id, {MERGED: " ".join([*earlier, identifier][-_REMEMBERED:])})


@contextlib.contextmanager
def planning(site: Site, top: Record, state: Record, target: str) -> Iterator[Callable[[Sequence[str]], MergePlan]]:
    """A function that plans the merge of a state, whose layers are kept meanwhile; the arguments are as above."""
    snapshotter = site.snapshotter
    check_outside(snapshotter, target)
    with contextlib.ExitStack() as stack:
        pair = Pair(checkpoints.base_of(snapshotter, top), state)
        before, after, since = stack.enter_context(snapshotter.comparing(pair, "merge"))
        merged = []
        for identifier in top.labels.get(MERGED, "").split():
            with contextlib.suppress(errors.NotFound):  # it was forgotten
                earlier = Pair(naming.find(snapshotter, top, identifier), state)
                layers, _, edited = stack.enter_context(snapshotter.comparing(earlier, "merge"))
                merged.append((layers, edited))
        yield lambda select: plan(before, after, snapshotter.markers, target, select=select, since=since, merged=merged)
