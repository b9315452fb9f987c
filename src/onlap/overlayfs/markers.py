"""What OverlayFS writes into layers: whiteouts, opaque directories, redirects, metacopy.

An overlay keeps its markers in ``trusted.overlay.*``, or in ``user.overlay.*`` when it was mounted with ``userxattr``;
the *flavour* of a root says which, and all of its layers have the same.

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
WHITEOUT_RDEV = 0
OPAQUE_YES = b"y"
OPAQUE_XATTR_WHITEOUTS = b"x"


class Markers:
    """The names of one flavour's xattrs.

    Args:
        flavour: ``"trusted"`` or ``"user"``.
        recorded: whether the layers' files may have an owner that could not be set and is recorded in an xattr
            (:data:`onlap.trees.meta.OVERRIDE_XATTR`); by default those of the user flavour.
    """

    __slots__ = ("flavour", "metacopy", "opaque", "prefix", "recorded", "redirect", "whiteout")

    def __init__(self, flavour: str, *, recorded: bool | None = None) -> None:
        if flavour not in FLAVOURS:
            raise ValueError(f"no such xattr flavour: {flavour!r}")
        self.flavour = flavour
        self.recorded = flavour == USER if recorded is None else recorded
        self.prefix = f"{flavour}.overlay."
        self.opaque = self.prefix + "opaque"
        self.redirect = self.prefix + "redirect"
        self.metacopy = self.prefix + "metacopy"
        self.whiteout = self.prefix + "whiteout"

    @property
    def mount_flags(self) -> tuple[str, ...]:
        """What a mount must say for the kernel to read this flavour."""
        return ("userxattr",) if self.flavour == USER else ()


def is_marker(xattr: str) -> bool:
    """Whether an xattr belongs to OverlayFS, whatever the flavour: it never leaves a layer, nor comes into one."""
    return xattr.startswith(("trusted.overlay.", "user.overlay."))


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a file of a layer is a whiteout device."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == WHITEOUT_RDEV


def make_whiteout(name: str | bytes, *, dir_fd: int) -> None:
    """Make a whiteout device; allowed also in a user namespace (Linux 5.8, device number 0/0 only)."""
    os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=dir_fd)


def get_xattr(path: str | bytes | int, name: str) -> bytes | None:
    """The value of an xattr, None where the file or the filesystem has none; symlinks are not followed."""
    try:
        if isinstance(path, int):
            return os.getxattr(path, name)
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def set_opaque(dir_fd: int, markers: Markers) -> None:
    """Make a directory hide what the layers below have at its place."""
    os.setxattr(dir_fd, markers.opaque, OPAQUE_YES)
