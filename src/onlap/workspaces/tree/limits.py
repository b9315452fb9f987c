"""Limits of what a command may write in a workspace: a tmpfs of that size is its writable layer.

What it wrote is copied into the workspace's own layer when it has ended. So a command that fills its limit fails with
ENOSPC, as on a full disk, and nobody else does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap import errors
from onlap.arguments import check_number
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.mounts import kernel
from onlap.mounts.plan import Mount
from onlap.mounts.userns import may_mount
from onlap.snapshots import exclusion
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.copy import Copier, copy_attributes, copy_tree
from onlap.workspaces.records import LIMITS, workspace_of

# The root of the tmpfs, upper, work, and work/work, which the kernel makes.
_OWN_INODES = 4


class Limits(NamedTuple):
    """What one command may write; None: no limit.

    Attributes:
        size: bytes, rounded up to pages.
        inodes: files, directories and links.
    """

    size: int | None
    inodes: int | None

    @property
    def label(self) -> str:
        """As a label."""
        return f"{self.size or ''} {self.inodes or ''}"


def parse(record: Record) -> Limits | None:
    """The limits of a workspace, by the labels of its top; None without any."""
    label = record.labels.get(LIMITS)
    if label is None:
        return None
    size, inodes = (int(part) if part else None for part in label.split(" "))
    return Limits(size, inodes)


def checked(snapshotter: RecordedSnapshotter, size: int | None, inodes: int | None) -> Limits | None:
    """The limits that a caller wants.

    Raises:
        InvalidArgument: they are not positive numbers.
        Unimplemented: they cannot be kept here.
    """
    for value, what in ((size, "limit of bytes"), (inodes, "limit of inodes")):
        if value is None:
            continue
        check_number(value, what, whole=True)
        if value <= 0:
            raise errors.InvalidArgument(f"the {what} is {value}", hint="it must be more than 0")
    if size is None and inodes is None:
        return None
    if not isinstance(snapshotter, OverlaySnapshotter) or not may_mount():
        raise errors.Unimplemented(
            "limits need an overlay root and the privilege to mount",
            hint="run it as root, or limit the filesystem that the root lies on",
        )
    return Limits(size, inodes)


@contextlib.contextmanager
def enforced(snapshotter: RecordedSnapshotter, top: Record, limits: Limits) -> Iterator[int]:
    """Mount a top with a limited layer, and copy what was written to its own at the end.

    Yields:
        A descriptor of the tree.

    Raises:
        Busy: it is mounted elsewhere, or something was written to it that is in no checkpoint.
        ResourceExhausted: at the end: the limit was reached.
        OnlapError: of another kind, for an error of the kernel or the filesystem.
    """
    name = workspace_of(top.name)
    if not snapshotter.is_unchanged(top):
        raise errors.Busy(f"another command runs in workspace {shown(name)}, which has limits", key=name, hint="wait")
    # 0: without limit (Documentation/filesystems/tmpfs.rst).
    options = (f"size={limits.size or 0}", f"nr_inodes={limits.inodes + _OWN_INODES if limits.inodes else 0}")
    tree = snapshotter.catalog.layout.tree(top.id)
    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(exclusion.mounting(snapshotter, top))[0]
        stack.enter_context(snapshotter.translated("limit", top.name))
        memory = kernel.detached(Mount("tmpfs", "tmpfs", flags=("mode=0700", *options)))
        stack.callback(os.close, memory)
        upper, work = (f"/proc/self/fd/{memory}/{part}" for part in ("upper", "work"))
        os.mkdir(upper)
        os.mkdir(work)
        copy_attributes(tree, upper)
        overlay = kernel.detached(plan._replace(upper=upper, work=work))
        try:
            yield overlay
        finally:
            os.close(overlay)
            copy_tree(upper, tree, Copier(keep_markers=True, allow_changes=True))
            left = os.statvfs(memory)
        if (limits.size and not left.f_bavail) or (limits.inodes and not left.f_favail):
            given = [f"{value} {unit}" for value, unit in zip(limits, ("bytes", "inodes"), strict=True) if value]
            raise errors.ResourceExhausted(
                f"a command has reached the limit of workspace {shown(name)}: {' and '.join(given)}",
                key=name,
                hint="what was written until then is in the workspace; go back with: onlap ws rollback",
            )
