"""What OverlayFS can do in a driver's home: found by a trial mount, as in Docker.

Sources: moby v26.1.5, daemon/graphdriver/overlayutils/overlayutils.go and overlay2/check.go.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.graphdrivers.home import CHECKING, claim, detach, remove_tree
from onlap.mounts import kernel
from onlap.mounts.plan import overlay
from onlap.overlayfs.markers import OPAQUE_YES, TRUSTED, USER, Markers, get_xattr, set_opaque
from onlap.overlayfs.options import without_index
from onlap.probing.files import d_type
from onlap.probing.trial import Unsupported
from onlap.syscalls.files import filesystem_magic
from onlap.syscalls.namespaces import in_user_namespace
from onlap.trees.walk import OPEN_DIRECTORY, opened

_SELINUX = "/sys/fs/selinux/enforce"

# moby: daemon/graphdriver/driver_linux.go, FsNames; "docker info" shows these names.
_NAMES = {
    0x9123683E: "btrfs",
    0xEF53: "extfs",
    0xF15F: "ecryptfs",
    0x01021994: "tmpfs",
    0x58465342: "xfs",
    0x2FC12FC1: "zfs",
    0x794C7630: "overlayfs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
    0x858458F6: "ramfs",
}


class Support(NamedTuple):
    """What OverlayFS can do.

    Attributes:
        filesystem: Docker's name of the home's filesystem.
        markers: the flavour of the markers in layers.
        flags: options of each mount, as Docker gives them.
        metacopy: whether the kernel copies up without content when only attributes change.
        native_diff: whether an upper layer shows what changed; not if the kernel copies up opaque markers (before
            Linux 4.8).
    """

    filesystem: str
    markers: Markers
    flags: tuple[str, ...]
    metacopy: bool
    native_diff: bool


def probe_support(home: str) -> Support:
    """Try an overlay in ``home``, which exists.

    Raises:
        Unimplemented: OverlayFS does not work here; the message says why.
        OnlapError: of another kind, for other errors of the kernel.
    """
    markers = Markers(USER if in_user_namespace() else TRUSTED)
    flags = (*without_index(), *markers.mount_flags)
    base = f"{CHECKING}{os.getpid()}-{os.urandom(4).hex()}"
    with (
        errors.translated("try OverlayFS", key=home),
        opened(home, OPEN_DIRECTORY & ~os.O_NOFOLLOW) as fd,
        claim(os.path.join(home, base)),
    ):
        magic = filesystem_magic(fd)
        filesystem = _NAMES.get(magic, f"{magic:#x}")
        try:
            return _try(os.path.join(home, base), filesystem, markers, flags)
        finally:
            remove_tree(fd, home, base)


def _try(base: str, filesystem: str, markers: Markers, flags: tuple[str, ...]) -> Support:
    try:
        d_type(base)
    except Unsupported as error:
        raise errors.Unimplemented(f"OverlayFS does not work on this {filesystem}: {error}", key=base) from error
    bottom, middle, upper, work, merged = (os.path.join(base, name) for name in ("b", "m", "u", "w", "merged"))
    for directory in (bottom, middle, upper, work, merged, f"{bottom}/d", f"{middle}/d"):
        os.mkdir(directory, 0o755)
    with open(f"{bottom}/f", "wb") as file:
        file.write(b"content")
    with opened(f"{middle}/d") as fd:
        set_opaque(fd, markers)
    try:
        kernel.attach(overlay((middle, bottom), upper=upper, work=work, flags=flags), merged)
    except errors.PermissionDenied:
        raise
    except errors.OnlapError as error:
        raise errors.Unimplemented(
            f"no overlay can be mounted on this {filesystem}: {error.message}",
            key=base,
            hint="put Docker's data root on ext4 or xfs",
        ) from error
    try:
        with open(f"{merged}/d/new", "wb"):
            pass
        os.chmod(f"{merged}/f", 0o600)
        metacopy = get_xattr(f"{upper}/f", markers.metacopy) is not None
        opaque = get_xattr(f"{upper}/d", markers.opaque) == OPAQUE_YES
    finally:
        detach(merged)
    return Support(filesystem, markers, flags, metacopy, native_diff=not opaque)


def label_flag(label: str) -> tuple[str, ...]:
    """The mount option for an SELinux label; none for an empty one.

    Raises:
        Unimplemented: SELinux is not in use, so the label would have no effect.
    """
    if not label:
        return ()
    if not os.path.exists(_SELINUX):
        raise errors.Unimplemented(
            f"the mount label {shown(label)} would have no effect: SELinux is not in use here",
            hint="start dockerd without --selinux-enabled",
        )
    return (f"context={label}",)
