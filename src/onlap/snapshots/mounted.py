"""Whether somebody has an active snapshot mounted read-write, asked before it is committed."""

from __future__ import annotations

import os

from onlap.errors import shown
from onlap.mounts import mountinfo, namespaces
from onlap.overlayfs.options import octal_unescape, unescape


def writable_mounts(tree: str, work: str, *, bound: bool, everywhere: bool) -> list[str]:
    """Where ``tree`` can be written through, as text.

    Args:
        tree: a snapshot's ``fs`` directory.
        work: its workdir.
        bound: whether its plan is a bind; else it is an overlay, and only those count that the kernel made: it makes
            ``work/work`` when it mounts one read-write, and leaves it there (fs/overlayfs/super.c).
        everywhere: look for binds in other mount namespaces too. To read them all takes milliseconds, which the commit
            of a snapshot that nobody ever wrote to does not have to pay.

    Raises:
        OSError: what is mounted here cannot be read.
    """
    overlaid = os.path.lexists(f"{work}/work")
    if not overlaid and not bound:
        return []
    # Of the directory above, since something may be mounted on the tree itself.
    snapshot, name = os.path.split(tree)
    above = mountinfo.place_of(snapshot)
    place = above and mountinfo.Place(above.device, above.path + b"/" + os.fsencode(name))
    # In an overlay's options as in the root of a bind, and the same in both: no byte of it is escaped.
    needle = os.fsencode("/".join(tree.split("/")[-2:]))
    found = []
    for text in namespaces.tables() if everywhere or overlaid else (mountinfo.own(),):
        for entry in mountinfo.parse(text, needle):
            if entry.options.split(b",")[0] != b"rw":
                continue
            if entry.fstype == b"overlay":
                writes = any(_is(text, path, os.fsencode(tree), place) for path in _upperdirs(entry.super_options))
            else:
                writes = place is not None and entry.device == place.device and _covers(entry.root, place.path)
            if writes:
                found.append(shown(entry.mountpoint))
    return found


def _is(text: bytes, path: bytes, tree: bytes, place: mountinfo.Place | None) -> bool:
    """Whether a path of a mount table is that directory; a root may be bound to another place there."""
    if path == tree:
        return True
    return place is not None and mountinfo.Table(text).place(path) == place


def _covers(mounted: bytes, root: bytes) -> bool:
    return mounted == root or mounted.startswith(root + b"/")


def _upperdirs(super_options: bytes) -> list[bytes]:
    """What an overlay's upperdir may be: the kernel shows it with or without the escapes that mount(2) was given."""
    for option in super_options.split(b","):
        key, _, value = option.partition(b"=")
        if key == b"upperdir":
            shown_as = octal_unescape(value)
            return [shown_as, unescape(shown_as)]
    return []
