"""Where a snapshot is mounted, according to mountinfo. This is checked before a commit and a removal."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from onlap.errors import shown
from onlap.mounts import mountinfo, namespaces
from onlap.mounts.holders import command
from onlap.mounts.mountinfo import relative_to
from onlap.mounts.plan import Mount
from onlap.overlayfs.options import layer_paths, upperdirs
from onlap.syscalls.files import exists


def mounts_of(tree: str, work: str, *, bound: bool, writable: bool) -> list[str]:
    """Where a snapshot's own tree is mounted, as text.

    Args:
        tree: the snapshot's ``fs`` directory.
        work: its workdir.
        bound: whether its plan is a bind. If it is an overlay, only one that was ever mounted read-write counts: the
            kernel then makes ``work/work``, and leaves it there (fs/overlayfs/super.c).
        writable: only read-write mounts.

    Raises:
        OSError: mountinfo cannot be read.
    """
    overlaid = exists(f"{work}/work")
    if not overlaid and not bound:
        return []
    from onlap.layers.diff.changes import is_empty_layer  # costly, and mostly not reached

    # Reading the tables of all namespaces takes milliseconds. A bind that was never written to need not pay that.
    everywhere = overlaid or not is_empty_layer(tree)
    needle = _needle(tree)
    place = functools.cache(lambda: _place(tree))  # mostly nothing is found, and it is not needed
    found = []
    for pid, text in namespaces.tables_of_processes() if everywhere else ((None, mountinfo.own()),):
        table = mountinfo.Table(text)
        for entry in mountinfo.parse(text, needle):
            if writable and entry.options.split(b",")[0] != b"rw":
                continue
            if entry.fstype == b"overlay":
                uses = _has_upper(entry, table, tree, place)
            else:
                at = place()
                uses = at is not None and entry.device == at.device and relative_to(entry.root, at.path) is not None
            if uses:
                found.append(_text(entry, pid))
    return found


def is_upper_in(text: bytes, tree: str, but: str | None = None) -> bool:
    """Whether a mount table has an overlay with this upper layer, at another mount point than ``but``."""
    place, table = functools.cache(lambda: _place(tree)), mountinfo.Table(text)
    return any(
        entry.fstype == b"overlay"
        and (but is None or entry.mountpoint != os.fsencode(but))
        and _has_upper(entry, table, tree, place)
        for entry in mountinfo.parse(text, _needle(tree))
    )


def users_of(tree: str, but: str | None = None) -> set[int]:
    """The processes in mount namespaces other than ours in which an overlay with this upper layer is mounted.

    Args:
        tree: the upper layer.
        but: a mount point that does not count.
    """
    return set(namespaces.members(lambda text: is_upper_in(text, tree, but)))


def mounts_of_plan(plan: list[Mount]) -> list[str]:
    """Where a plan without an upper layer is mounted, as text: the same layers in the same order, or the same bind.

    Raises:
        OSError: mountinfo cannot be read.
    """
    mount = plan[0]
    layers = [os.fsencode(layer) for layer in mount.lowers]
    tree = mount.lowers[0] if layers else mount.source
    place = _place(tree)
    found = []
    for pid, text in namespaces.tables_of_processes():
        for entry in mountinfo.parse(text, _needle(tree)):
            if layers:
                uses = entry.fstype == b"overlay" and layer_paths(entry.super_options) == layers
            else:
                uses = place is not None and (entry.device, entry.root) == place
            if uses:
                found.append(_text(entry, pid))
    return found


def _text(entry: mountinfo.Entry, pid: int | None) -> str:
    """A mount for a message: one in another namespace says who is there, since nobody else can unmount it."""
    where = shown(entry.mountpoint)
    return where if pid is None else f"{where}, in the mount namespace of pid {pid} ({command(pid)})"


def _place(tree: str) -> mountinfo.Place | None:
    # By the directory above, since something may be mounted on the tree itself.
    snapshot, name = os.path.split(tree)
    above = mountinfo.place_of(snapshot)
    return above and mountinfo.Place(above.device, above.path + b"/" + os.fsencode(name))


def _needle(tree: str) -> bytes:
    """The part of a line that names the tree, both in an overlay's options and in a bind's root: no byte is escaped."""
    return os.fsencode("/".join(tree.split("/")[-2:]))


def _has_upper(
    entry: mountinfo.Entry, table: mountinfo.Table, tree: str, place: Callable[[], mountinfo.Place | None]
) -> bool:
    """Whether an overlay in a mount table has this upper layer; the root may be bound to another place there."""
    return any(
        path == os.fsencode(tree) or (place() is not None and table.place(path) == place())
        for path in upperdirs(entry.super_options)
    )
