"""Trials of a filesystem, without mounts. Each takes a directory to work in and returns a note, or raises."""

from __future__ import annotations

import os
from collections.abc import Callable

from onlap.overlayfs import markers
from onlap.probing.trial import NEEDS_PRIVILEGE, Unsupported, expect, read, reason_of, write
from onlap.syscalls import files
from onlap.trees.walk import opened


def d_type(base: str) -> str:
    """readdir(3) returns file types, which OverlayFS requires of an upper; XFS with ftype=0 does not."""
    directory = os.path.join(base, "d_type")
    os.makedirs(os.path.join(directory, "dir"))
    with os.scandir(directory) as entries:
        (entry,) = entries
    # os.scandir calls lstat where readdir returned no type. For a deleted directory only readdir's answer is left.
    os.rmdir(entry.path)
    expect(entry.is_dir(follow_symlinks=False), "readdir returns no file types (XFS: mkfs.xfs -n ftype=1)")
    return ""


def user_xattr(base: str) -> str:
    """Xattrs of the class ``user``."""
    return _xattr(base, "user.overlay.opaque")


def trusted_xattr(base: str) -> str:
    """Xattrs of the class ``trusted``, which OverlayFS uses."""
    try:
        return _xattr(base, "trusted.overlay.opaque")
    except PermissionError as error:
        raise Unsupported(NEEDS_PRIVILEGE) from error


def _xattr(base: str, name: str) -> str:
    directory = os.path.join(base, name)
    os.mkdir(directory)
    os.setxattr(directory, name, b"y")
    expect(os.getxattr(directory, name) == b"y", "the value read is not the one set")
    return ""


def reflink(base: str) -> str:
    """Two files can share their blocks (FICLONE)."""
    path = os.path.join(base, "reflink")
    write(path, "content" * 1000)
    with open(path, "rb") as source, open(path + ".clone", "wb") as target:
        files.clone_file(source.fileno(), target.fileno())
    expect(read(path + ".clone") == read(path), "the clone has different content")
    return ""


def rename_whiteout(base: str) -> str:
    """A rename can leave a whiteout (RENAME_WHITEOUT)."""
    directory = os.path.join(base, "rename_whiteout")
    os.mkdir(directory)
    write(os.path.join(directory, "old"), "")
    with opened(directory) as fd:
        files.renameat2(fd, "old", fd, "new", files.RENAME_WHITEOUT)
        expect(markers.is_whiteout(os.stat("old", dir_fd=fd, follow_symlinks=False)), "it left no whiteout")
    return ""


def fuse(_base: str) -> str:
    """/dev/fuse can be opened."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unsupported(f"cannot open /dev/fuse: {reason_of(error)}") from error
    return ""


PLAIN: dict[str, Callable[[str], str]] = {
    "d_type": d_type,
    "trusted_xattr": trusted_xattr,
    "user_xattr": user_xattr,
    "reflink": reflink,
    "rename_whiteout": rename_whiteout,
    "fuse": fuse,
}
