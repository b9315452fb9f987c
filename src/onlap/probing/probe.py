"""What this kernel and a directory can do, found by trial.

:func:`probe` tries everything; :func:`overlay_mode` tries only what decides how a root keeps its snapshots. Both work
in a scratch directory inside the given one, and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from onlap import errors
from onlap.arguments import StrPath, check_path
from onlap.boundary import public
from onlap.locks import abandoned, claim_directory
from onlap.mounts import kernel, mountinfo
from onlap.probing import overlays
from onlap.probing.files import PLAIN
from onlap.probing.trial import (
    NEEDS_PRIVILEGE,
    OVERLAYFS_MAGIC,
    Feature,
    Scratch,
    Unsupported,
    attempt,
    detect,
    explain_nesting,
)
from onlap.syscalls import files
from onlap.trees.remove import remove_at
from onlap.trees.walk import opened

__all__ = ["FEATURES", "MODES", "Feature", "Probe", "overlay_mode", "probe"]


# The prefix of scratch directories.
SCRATCH = ".onlap-probe-"

# Every name in Probe.features, in its order.
FEATURES = (
    "overlay",
    "d_type",
    "trusted_xattr",
    "user_xattr",
    "redirect_dir",
    "metacopy",
    "index",
    "xino",
    "volatile",
    "lowerdir_fd",
    "data_only",
    "xattr_whiteout",
    "rename_whiteout",
    "overlay_on_overlay",
    "idmapped",
    "user_namespaces",
    "unprivileged",
    "tmpfs",
    "fuse",
    "reflink",
)

OVERLAY = "overlay"
OVERLAY_USERXATTR = "overlay-userxattr"
NATIVE = "native"
MODES = (OVERLAY, OVERLAY_USERXATTR, NATIVE)

# include/uapi/linux/magic.h, and the filesystems' own sources; for a directory whose mount is not in
# /proc/self/mountinfo (in a chroot into the middle of a mount, or in a detached mount).
_MAGIC = {
    OVERLAYFS_MAGIC: "overlay",
    0xEF53: "ext4",
    0x58465342: "xfs",
    files.BTRFS: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x6969: "nfs",
    0x65735546: "fuse",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x2FC12FC1: "zfs",
    0x01021997: "9p",
}

# sqlite.org/wal.html, "WAL-reset bug": the affected branches, each from its first version to its fixed one.
_WAL_BUG = (((3, 7, 0), (3, 44, 6)), ((3, 45, 0), (3, 50, 7)), ((3, 51, 0), (3, 51, 3)))


class Probe:
    """The results.

    Attributes:
        directory: its absolute path.
        features: each of :data:`FEATURES`, with whether it works and why not.
        kernel: its release, as from ``uname -r``; nothing is decided by it.
        filesystem: the type of the directory's filesystem, as ``"ext4"``.
        free: bytes that an ordinary user can still write there.
        mode: how a root here keeps its snapshots, one of :data:`MODES`.
        why: the reason for ``mode``, in one line.
    """

    __slots__ = ("directory", "features", "filesystem", "free", "kernel", "mode", "why")

    def __init__(
        self, directory: str, features: Mapping[str, Feature], filesystem: str, free: int, mode: str, why: str
    ) -> None:
        self.directory = directory
        self.features = features
        self.kernel = os.uname().release
        self.filesystem = filesystem
        self.free = free
        self.mode = mode
        self.why = why

    def __repr__(self) -> str:
        return f"<Probe of {self.directory!r}: {self.mode}>"

    @property
    def sqlite(self) -> str:
        """The version of SQLite that this Python uses."""
        # Not at the top: loading it takes longer than most trials.
        import sqlite3

        return sqlite3.sqlite_version

    @property
    def sqlite_wal_bug(self) -> bool:
        """Whether that version can damage a database that two processes write and checkpoint at once."""
        return has_wal_bug(self.sqlite)


def has_wal_bug(version: str) -> bool:
    """Whether a version of SQLite has the "WAL-reset bug": 3.7.0 to 3.51.2 but for fixed branches."""
    numbers = tuple(int(part) for part in version.split("."))
    return any(first <= numbers < fixed for first, fixed in _WAL_BUG)


@public
def probe(directory: StrPath) -> Probe:
    """Find out what this kernel, with this process's privilege, can do in ``directory``.

    It takes about a tenth of a second. A feature that does not work is not an error; the reason is the kernel's.

    Args:
        directory: exists, and we can write in it.

    Raises:
        NotFound: it does not exist.
        PermissionDenied: we cannot write in it.
        OnlapError: of another kind, if it cannot be written to for another reason.
    """
    with _scratch(directory) as (where, base):
        on = _filesystem(base)
        free = os.statvfs(base)
        found = {name: attempt(trial, base) for name, trial in PLAIN.items()}
        scratch, found["overlay"] = _overlay(base)
        found |= _rest(scratch, found["overlay"], base)
        mode, why = _mode(found["overlay"], found["unprivileged"])
    features = MappingProxyType({name: found[name] for name in FEATURES})
    return Probe(where, features, on, free.f_bavail * free.f_frsize, mode, why)


def existing_above(path: str) -> str:
    """The directory itself, or the nearest one above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def overlay_mode(directory: StrPath) -> tuple[str, str]:
    """How a root in ``directory`` should keep its snapshots, by trying only what decides it.

    With the privilege to mount it takes a few milliseconds, without it a tenth of a second.

    Returns:
        One of :data:`MODES`, and the reason in one line.

    Raises:
        OnlapError: as :func:`probe`.
    """
    with _scratch(directory) as (_, base):
        scratch, overlay = _overlay(base)
        if overlay.ok:
            return _mode(overlay, None)
        from onlap.probing.process import UNPRIVILEGED, TrialProcess

        with TrialProcess(scratch or Scratch(base), [UNPRIVILEGED], drop=False) as running:
            return _mode(overlay, running.results()[UNPRIVILEGED])


def _mode(overlay: Feature, unprivileged: Feature | None) -> tuple[str, str]:
    if overlay.ok:
        return OVERLAY, "an overlay can be mounted and works here"
    if unprivileged is not None and unprivileged.ok:
        return OVERLAY_USERXATTR, f"an overlay works in a user namespace (without one: {overlay.reason})"
    other = unprivileged.reason if unprivileged is not None else "not tried"
    if other == overlay.reason:
        return NATIVE, f"no overlay here: {other}"
    return NATIVE, f"no overlay here: {overlay.reason}; in a user namespace: {other}"


def _overlay(base: str) -> tuple[Scratch | None, Feature]:
    """Try an overlay; returns how trials run (None if no overlay can be mounted at all) and the answer."""
    try:
        scratch = detect(base)
    except Unsupported as error:
        return None, Feature(False, str(error))
    if kernel.layers_by() != kernel.LAYERS_BY_STRING:
        overlay = attempt(overlays.overlay, scratch)
    else:
        from onlap.probing.process import TrialProcess

        with TrialProcess(scratch, ["overlay"], drop=False) as running:
            overlay = running.results()["overlay"]
    return scratch, explain_nesting(base, overlay)


def _rest(scratch: Scratch | None, overlay: Feature, base: str) -> dict[str, Feature]:
    """All features that need the privilege to mount, or a separate process."""
    from onlap.probing.process import UNPRIVILEGED, USER_NAMESPACES, TrialProcess

    ordinary = [USER_NAMESPACES, UNPRIVILEGED]
    if scratch is None or overlay.reason == NEEDS_PRIVILEGE:
        found = dict.fromkeys([*overlays.ON_OVERLAY, *overlays.ATTACHING, "tmpfs"], Feature(False, overlay.reason))
        detached = Scratch(base)
        if overlay.reason != NEEDS_PRIVILEGE:
            found["tmpfs"] = attempt(overlays.tmpfs, detached)
        with TrialProcess(detached, ordinary, drop=False) as running:
            return found | running.results()
    found = {}
    here = {"tmpfs": overlays.tmpfs}
    elsewhere = ["overlay_on_overlay"]
    if overlay.ok:
        here |= overlays.ON_OVERLAY
        elsewhere.append("xino")
    else:
        no = Feature(False, f"no overlay here: {overlay.reason}")
        found = dict.fromkeys([*overlays.ON_OVERLAY, "xino"], no)
    if kernel.layers_by() == kernel.LAYERS_BY_STRING:
        elsewhere += here
        here = {}
    # Fully privileged root becomes an ordinary user to try what one can do; a process that cannot mount is one already.
    with TrialProcess(scratch, elsewhere + ordinary, drop=overlay.ok and os.geteuid() == 0) as running:
        found |= {name: attempt(trial, scratch) for name, trial in here.items()}
        return found | running.results()


@contextlib.contextmanager
def _scratch(directory: StrPath) -> Iterator[tuple[str, str]]:
    """A new directory inside ``directory`` for the duration of a block; yields both, absolute."""
    where = os.path.abspath(check_path(directory, "directory to probe"))
    held = None
    with errors.translated("probe the directory", key=where):
        while held is None:  # another process may take it for abandoned before it is held
            base = os.path.join(where, f"{SCRATCH}{os.getpid()}-{os.urandom(4).hex()}")
            held = claim_directory(base)
    with held:
        try:
            yield where, base
        finally:
            with errors.translated("remove the scratch directory", key=base):
                remove_at(base)


def remove_abandoned(directory: str) -> None:
    """Remove the scratch directories of killed programs from a directory; raises OSError."""
    for name in abandoned(directory, (SCRATCH,)):
        remove_at(os.path.join(directory, name))


def _filesystem(directory: str) -> str:
    with opened(directory) as fd:
        mount = mountinfo.mount_of(fd)
        if mount is not None:
            return mount.fstype.decode()
        magic = files.filesystem_magic(fd)
    return _MAGIC.get(magic, f"{magic:#x}")
