"""Whether somebody has an active snapshot mounted read-write, asked before it is committed."""

from __future__ import annotations

import os

from onlap.errors import shown
from onlap.mounts import mountinfo
from onlap.overlayfs.options import octal_unescape


def writable_mounts(tree: str, work: str, *, bound: bool, everywhere: bool) -> list[str]:
    """Where ``tree`` can be written through, as text.

    Args:
        tree: a snapshot's ``fs`` directory.
        work: its workdir.
        bound: whether its plan is a bind; else it is an overlay, and only those count that the kernel made: it makes
            ``work/work`` when it mounts one read-write, and leaves it there (fs/overlayfs/super.c).
        everywhere: look for binds in other mount namespaces too. To read them all takes milliseconds, which the commit
            of a snapshot that nobody ever wrote to does not have to pay.
    """
    overlaid = os.path.lexists(f"{work}/work")
    if not overlaid and not bound:
        return []
    upper = os.fsencode(tree)
    root = mountinfo.path_within_filesystem(upper)
    found = []
    for entries in mountinfo.namespaces() if everywhere or overlaid else iter([mountinfo.read()]):
        for entry in entries:
            if entry.options.split(b",")[0] != b"rw":
                continue
            if entry.fstype == b"overlay":
                writes = _upperdir(entry.super_options) == upper
            else:
                writes = _covers(entry.root, root)
            if writes:
                found.append(shown(entry.mountpoint))
    return found


def _covers(mounted: bytes, root: bytes) -> bool:
    return mounted == root or mounted.startswith(root + b"/")


def _upperdir(super_options: bytes) -> bytes | None:
    for option in super_options.split(b","):
        key, _, value = option.partition(b"=")
        if key == b"upperdir":
            return octal_unescape(value)
    return None
