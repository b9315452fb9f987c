"""A checkpoint of a tree in which programs run: they are frozen while what was written is copied."""

from __future__ import annotations

from collections.abc import Mapping

from onlap import errors
from onlap.catalog.records import Record
from onlap.catalog.runs import begin
from onlap.errors import shown
from onlap.mounts import mountinfo
from onlap.mounts.freezer import frozen
from onlap.snapshots import exclusion
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.snapshots.where_mounted import is_upper_in, users_of
from onlap.workspaces.history import chains
from onlap.workspaces.records import workspace_of

# A program that is started meanwhile may write while its tree is copied; then it is copied again.
_TRIES = 5


def checkpoint(snapshotter: RecordedSnapshotter, top: Record, names: Mapping[str, str]) -> Record:
    """See :func:`onlap.workspaces.history.chains.copy`; the programs are those in mount namespaces of their own.

    Raises:
        Busy: the tree is also mounted in this namespace, where everybody may write to it.
        Unimplemented: there is no freezer that this user may use.
        OnlapError: see :func:`onlap.workspaces.history.chains.copy`.
    """
    tree, name = snapshotter.catalog.layout.tree(top.id), workspace_of(top.name)
    with (
        begin(snapshotter.catalog) as run,
        exclusion.keeping(snapshotter, top),
        snapshotter.translated("freeze what runs in", top.name),
    ):
        if is_upper_in(mountinfo.own(), tree):
            raise errors.Busy(
                f"workspace {shown(name)} is mounted where any process may write to it",
                key=name,
                hint="unmount it there first",
            )
        with frozen(lambda: users_of(tree), run.freezes, run.id) as all_frozen:
            for _ in range(_TRIES):
                record = chains.copy(snapshotter, top, names, all_frozen)
                if record is not None:
                    return record
    raise errors.Busy(f"programs are started in workspace {shown(name)} all the time", key=name, hint="try again later")
