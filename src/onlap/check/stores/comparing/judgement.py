"""What an entry of an archive says of the file that it left in a tree, and what it leaves open.

Sources: containerd v1.7.24, archive/tar.go (createTarFile) and archive/time.go (boundTime); moby v26.1.5,
pkg/archive/archive.go (createTarFile, FileInfoHeader) and pkg/archive/time.go.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from onlap.check.stores.contract import StoreLayer
from onlap.layers.format import tar
from onlap.overlayfs.markers import is_marker
from onlap.trees.manifest import Entry
from onlap.trees.meta import ACCESS_ACL, DEFAULT_ACL

_KINDS = {
    tar.FILE: stat.S_IFREG,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}
_SECOND = 10**9
# include/linux/kdev_t.h, as the applier has it
_MAX_MAJOR = (1 << 12) - 1
_MAX_MINOR = (1 << 20) - 1
# The largest time that Go has in nanoseconds, to which containerd and moby bound times (archive/time.go).
_LAST_TIME = (1 << 63) - 1
# What security modules label a file with is the machine's, and what the kernel measures of it.
_OF_MACHINE = ("security.selinux", "security.ima", "security.evm", "security.apparmor", "security.SMACK64")
# All archivers write it, so that a file that has it and should not was given power since.
CAPABILITY = "security.capability"


def expected(path: str, entry: tar.Entry, found: Entry | None, layer: StoreLayer, *, is_shared: bool = False) -> Entry:
    """What a tree should have at a path.

    Args:
        path: the path.
        entry: what the archive says.
        found: what the tree has, from which comes what the archive does not say; None if it has nothing.
        layer: the layer.
        is_shared: whether the file has several names.
    """
    kind = _KINDS[entry.type]
    same = found is not None and stat.S_IFMT(found.mode) == kind
    mode = kind | entry.mode
    # An ACL and the mode change each other, and the peers set them in different orders (acl(5)).
    if found is not None and same and (kind == stat.S_IFLNK or ACCESS_ACL in (entry.xattrs or {})):
        mode = found.mode
    uid, gid = (found.uid, found.gid) if found is not None else (0, 0)
    if layer.shift is not None:
        uid, gid = entry.uid + layer.shift, entry.gid + layer.shift
    mtime = bounded(entry.mtime_ns)
    if found is not None and same and _is_time_right(entry, found, layer, is_shared):
        mtime = found.mtime_ns
    return Entry(
        path,
        mode,
        uid,
        gid,
        mtime,
        entry.size if kind == stat.S_IFREG else 0,
        "",
        _device(entry) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        entry.linkname if kind == stat.S_IFLNK else "",
        0,
        _xattrs(kind, entry.xattrs or {}, found.xattrs if found is not None and same else None, layer),
    )


def _device(entry: tar.Entry) -> int:
    if not (0 <= entry.devmajor <= _MAX_MAJOR and 0 <= entry.devminor <= _MAX_MINOR):
        raise ValueError(f"the device number {entry.devmajor},{entry.devminor} is out of range")
    return os.makedev(entry.devmajor, entry.devminor)


def may_be_missing(entry: tar.Entry, layer: StoreLayer) -> bool:
    """Whether what made the tree may have left a file out."""
    return layer.is_partial and entry.type in (tar.CHAR, tar.BLOCK_DEVICE, tar.FIFO)


def implied(path: str, layer: StoreLayer) -> Entry:
    """A directory that an archive only implies, as containerd and moby make it."""
    return Entry(path, stat.S_IFDIR | 0o755, layer.shift or 0, layer.shift or 0, 0)


def agrees(entry: tar.Entry, status: os.stat_result, shift: int | None) -> bool:
    """Whether a file has the mode, owner and time that a hard link's header says."""
    return (
        (stat.S_ISLNK(status.st_mode) or stat.S_IMODE(status.st_mode) == entry.mode)
        and (shift is None or (status.st_uid, status.st_gid) == (entry.uid + shift, entry.gid + shift))
        and _is_same_time(bounded(entry.mtime_ns), status.st_mtime_ns)
    )


def is_as(entry: Entry, status: os.stat_result) -> bool:
    """Whether a file has the attributes that its names share."""
    found = status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns
    return found == (entry.mode, entry.uid, entry.gid, entry.mtime_ns)


def linked(first: Entry, entry: tar.Entry, status: os.stat_result | None, layer: StoreLayer) -> Entry:
    """What a file with several names should be after the entry of a further one, whose header the peers apply, too.

    Args:
        first: what it should be before.
        entry: of the further name.
        status: of the file, if it is there.
        layer: the layer.
    """
    mtime = bounded(entry.mtime_ns)
    if status is not None and _is_same_time(mtime, status.st_mtime_ns):
        mtime = status.st_mtime_ns
    mode = first.mode if stat.S_ISLNK(first.mode) else stat.S_IFMT(first.mode) | entry.mode
    if layer.shift is None:
        return first._replace(mode=mode, mtime_ns=mtime)
    return first._replace(mode=mode, uid=entry.uid + layer.shift, gid=entry.gid + layer.shift, mtime_ns=mtime)


def bounded(mtime_ns: int) -> int:
    """The time that the peers give a file, in nanoseconds."""
    return mtime_ns if 0 <= mtime_ns <= _LAST_TIME else 0


def _is_time_right(entry: tar.Entry, found: Entry, layer: StoreLayer, is_shared: bool) -> bool:
    # containers/storage gives directories and symlinks no time in a pull of parts. With use_hard_links, files with the
    # same content in several layers are one file, with the time of the last of them.
    if layer.is_partial and (entry.type in (tar.DIRECTORY, tar.SYMLINK) or is_shared):
        return True
    return _is_same_time(bounded(entry.mtime_ns), found.mtime_ns) or entry.mtime_ns == found.mtime_ns


def _is_same_time(wanted: int, found: int) -> bool:
    # Archives made of trees have whole seconds (moby, FileInfoHeader), and their trees have more.
    return wanted == found or (wanted % _SECOND == 0 and found // _SECOND == wanted // _SECOND)


def _xattrs(
    kind: int, said: Mapping[str, bytes], there: Mapping[str, bytes] | None, layer: StoreLayer
) -> dict[str, bytes]:
    """What a file should have, and what is open and there; None: there is no such file, and it is to be made."""
    is_made, found = there is None, there or {}

    def is_open(name: str) -> bool:
        # One that an ordinary user sets has the user in it (capabilities(7), "Namespaced file capabilities").
        if name == ACCESS_ACL or (name == DEFAULT_ACL and layer.shift is None):
            return name in found
        if name.startswith("trusted."):
            return not is_made or layer.drops_trusted or layer.shift is None
        return _is_open(kind, name) or (name == CAPABILITY and layer.shift is None and name in found)

    wanted = {name: value for name, value in said.items() if not is_open(name)}
    wanted |= {name: value for name, value in found.items() if name not in said and name != CAPABILITY}
    return wanted | {name: found[name] for name in said.keys() & found.keys() if is_open(name)}


def _is_open(kind: int, name: str) -> bool:
    """Whether an xattr need not be what the archive says: the kernel or the machine may have refused or changed it."""
    # xattr(7): "user." only on files and directories.
    is_refused = name.startswith("user.") and kind not in (stat.S_IFREG, stat.S_IFDIR)
    return is_refused or is_marker(name) or name in _OF_MACHINE
