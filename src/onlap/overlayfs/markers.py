"""OverlayFS's markers in layers: whiteouts, opaque directories, redirects, metacopy.

An overlay keeps its markers in ``trusted.overlay.*``, or in ``user.overlay.*`` if it was mounted with ``userxattr``.
This *flavour* is the same for all layers of a root.

Source: the kernel's Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories", "redirect_dir",
"Metadata only copy up", "User xattr".
"""

from __future__ import annotations

import errno
import os
import stat

TRUSTED = "trusted"
USER = "user"
FLAVOURS = (TRUSTED, USER)

# overlayfs.rst: a whiteout is a character device with number 0/0, or (Linux 6.7) an empty regular file with the xattr
# overlay.whiteout in a directory whose overlay.opaque is "x".
OPAQUE_YES = b"y"
OPAQUE_XATTR_WHITEOUTS = b"x"


class Markers:
    """The names of one flavour's xattrs.

    Args:
        flavour: ``"trusted"`` or ``"user"``.
        recorded: whether owners that could not be set are recorded in an xattr of the layers' files
            (:data:`onlap.trees.meta.OVERRIDE_XATTR`); by default only in the user flavour.
    """

    __slots__ = ("flavour", "metacopy", "opaque", "origin", "prefix", "recorded", "redirect", "whiteout")

    def __init__(self, flavour: str, *, recorded: bool | None = None) -> None:
        if flavour not in FLAVOURS:
            raise ValueError(f"no such xattr flavour: {flavour!r}")
        self.flavour = flavour
        self.recorded = flavour == USER if recorded is None else recorded
        self.prefix = f"{flavour}.overlay."
        self.opaque = self.prefix + "opaque"
        self.origin = self.prefix + "origin"
        self.redirect = self.prefix + "redirect"
        self.metacopy = self.prefix + "metacopy"
        self.whiteout = self.prefix + "whiteout"

    @property
    def mount_flags(self) -> tuple[str, ...]:
        """The mount options that make the kernel use this flavour."""
        return ("userxattr",) if self.flavour == USER else ()


def is_marker(xattr: str) -> bool:
    """Whether an xattr is OverlayFS's, of any flavour: it is never copied into or out of a layer."""
    return xattr.startswith(("trusted.overlay.", "user.overlay."))


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a file of a layer is a whiteout device."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def make_whiteout(name: str | bytes, *, dir_fd: int) -> None:
    """Make a whiteout device; also allowed in a user namespace (Linux 5.8, only device number 0/0)."""
    os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=dir_fd)


def get_xattr(path: str | bytes | int, name: str) -> bytes | None:
    """The value of an xattr; None if the file or the filesystem has none. A symlink is not followed."""
    try:
        return os.getxattr(path, name, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def has_xattr(fd: int, name: str) -> bool:
    """Whether an open file has an xattr; quicker than :func:`get_xattr` where most have none, as it raises nothing."""
    try:
        return name in os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise


def set_opaque(dir_fd: int, markers: Markers) -> None:
    """Make a directory opaque: it hides the directories at its path in the layers below."""
    os.setxattr(dir_fd, markers.opaque, OPAQUE_YES)
