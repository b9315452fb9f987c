"""Whether somebody has an active snapshot mounted read-write, asked before it is committed."""

from __future__ import annotations

import os

from onlap.errors import shown
from onlap.mounts import mountinfo
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
    """
    overlaid = os.path.lexists(f"{work}/work")
    if not overlaid and not bound:
        return []
    upper = os.fsencode(tree)
    below = mountinfo.mount_of(upper)
    root = mountinfo.path_within(below, upper)
    found = []
    here = mountinfo.Namespace(os.getpid(), mountinfo.read())
    for namespace in mountinfo.namespaces() if everywhere or overlaid else iter([here]):
        for entry in namespace.entries:
            if entry.options.split(b",")[0] != b"rw":
                continue
            if entry.fstype == b"overlay":
                writes = any(_is(namespace.pid, path, tree) for path in _upperdirs(entry.super_options))
            else:
                writes = entry.device == below.device and _covers(entry.root, root)
            if writes:
                found.append(shown(entry.mountpoint))
    return found


def _is(pid: int, path: bytes, tree: str) -> bool:
    """Whether a path, as the process sees it, is that directory; a root may be bound to another place there."""
    if path == os.fsencode(tree):
        return True
    if path.split(b"/")[-3:] != os.fsencode(tree).split(b"/")[-3:]:
        return False
    try:
        return os.path.samefile(f"/proc/{pid}/root".encode() + path, tree)
    except OSError:
        return False  # the process ended, or nothing is there any more


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
