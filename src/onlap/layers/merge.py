"""Several layers that lie on each other become one, by hard links: no data is read or copied.

What st_nlink shows afterwards: a file has one more name for each layer that it was linked into, and an overlay shows a
lower file's link count as it is (Documentation/filesystems/overlayfs.rst, "Non-standard behavior"). So ``stat`` of an
unchanged file in a mounted tree may count more names than the tree has, and so does a program that goes by it (tar,
rsync -H: they note the file and find no second name). The copy-up of a change makes a file with one name again. The
count falls when the other layers are removed. Onlap itself counts the names that a tree shows.

Each new name, and each one that goes with another layer, also sets st_ctime. Programs that take it for a sign of a
change read such files again: git, unless core.trustCtime is off; and :func:`onlap.trees.compare.may_differ`. So a layer
with very many files that seldom changes is better left as it is, below those that are merged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.errors import shown
from onlap.overlayfs.markers import Markers, is_whiteout, make_whiteout, set_opaque
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.meta import drop_acls, list_xattrs
from onlap.trees.walk import OPEN_DIRECTORY, Descent, path_of

# A file that had this many names before the merge becomes a copy. A merge at most doubles the names of a file, so the
# others stay below the limits of ext4 (65,000) and btrfs (65,535), and no file meets them between two of its names:
# its names would no longer be one file. Files below the first number are not kept in mind.
_MANY = 1_000
_TOO_MANY = 20_000


def merge_layers(layers: Sequence[str], target: int, markers: Markers) -> None:
    """Make one layer that shows, on top of any other layers, exactly what several layers show in its place.

    Files, symlinks, FIFOs, devices and whiteouts are hard links of those in the topmost layer that has them; whiteouts
    in the form of an xattr become devices. Directories are new. Two names of one file stay two names of one file.
    The cost is that of the entries in these layers; open descriptors are bounded, however deep they are.

    The layers must not change meanwhile; and since their files are those of the target, none of them may be written to
    afterwards: the target must not become an upperdir. If it fails, the target holds a part, to be removed.

    Args:
        layers: the directories of the layers, topmost first, with no redirects (``redirect_dir``) and no metacopies.
        target: a descriptor of an empty directory on the same filesystem; it gets the attributes of the topmost
            layer's top.
        markers: the flavour of the markers in all of them.

    Raises:
        Unimplemented: there is a redirect or a metacopy.
        OSError: something cannot be read or linked.
    """
    # New directories would inherit them; the target gets those of the topmost layer in the end.
    drop_acls(target)
    with Stack(layers, markers) as stack:
        _Merge(target, markers).run(stack.top())


class _Level:
    """A directory on the way down.

    Attributes:
        source: the merged directory.
        prefix: its path with a slash, empty for the top.
        left: the names still to be done.
        hides: whether the new directory has a whiteout.
    """

    __slots__ = ("hides", "left", "prefix", "source")

    def __init__(self, source: MergedDirectory, prefix: str) -> None:
        self.source = source
        self.prefix = prefix
        self.left: Iterator[str] = iter(sorted(source.names_above(0), key=os.fsencode))
        self.hides = False


class _Merge:
    """One merge, without recursion."""

    def __init__(self, target: int, markers: Markers) -> None:
        self._top = target
        self._markers = markers
        # Markers of the topmost directory stay but this one, which depends on all of them.
        self._copier = Copier(keep_markers=True, leave_out=(markers.opaque,))
        # Files with many names: the first name of their copy; None for those that are linked.
        self._copies: dict[tuple[int, int], str | None] = {}

    def run(self, top: MergedDirectory) -> None:
        """Fill the target."""
        descent = Descent(self._top)
        levels = [_Level(top, "")]
        try:
            while levels:
                level = levels[-1]
                for name in level.left:
                    below = self._entry(level, name, descent.fd)
                    if below is not None:
                        levels.append(below)
                        descent.enter(os.open(name, OPEN_DIRECTORY, dir_fd=descent.fd))
                        break
                else:
                    self._finish(level, descent.fd)
                    levels.pop().source.close()
                    if levels:
                        descent.leave()
        finally:
            descent.close()

    def _entry(self, level: _Level, name: str, target: int) -> _Level | None:
        """One name of a directory; if it is itself a directory, it is made, and returned to do what is in it."""
        source, path = level.source, level.prefix + name
        found = source.topmost(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "a file of a layer vanished", path)
        if source.is_whiteout(found):
            # Below an opaque directory there is nothing to hide, and the kernel would list whiteouts as files.
            if not source.closed:
                level.hides = True
                self._whiteout(found, target)
            return None
        if not stat.S_ISDIR(found.status.st_mode):
            if stat.S_ISREG(found.status.st_mode):
                self._check_data(found, path)
            self._file(found, path, target)
            return None
        below = source.open(name)
        if below is None:
            raise FileNotFoundError(errno.ENOENT, "a directory of a layer vanished", path)
        if below.redirected:
            raise _unimplemented(path, "a directory that was renamed (redirect_dir)")
        os.mkdir(name, 0o700, dir_fd=target)
        return _Level(below, path + "/")

    def _check_data(self, found: Found, path: str) -> None:
        if self._markers.metacopy in list_xattrs(path_of(found.dir_fd, found.name)):
            raise _unimplemented(path, "a file whose data are in another layer (metacopy)")

    def _finish(self, level: _Level, target: int) -> None:
        """The attributes of a directory: after what is in it, which changes its time or needs it writable."""
        if level.source.closed:
            set_opaque(target, self._markers)
        elif level.hides:
            # If no layer below has this directory, it is not merged, and the kernel looks for whiteouts when it lists
            # it only if it has an origin; an empty one is one that is not known (fs/overlayfs/inode.c, ovl_get_inode,
            # "non-merge dir that may have whiteouts"; util.c, ovl_path_check_origin_xattr).
            os.setxattr(target, self._markers.origin, b"")
        self._copier.attributes(level.source.parts[0].fd, target)

    def _whiteout(self, found: Found, target: int) -> None:
        if is_whiteout(found.status):
            try:
                _link(found, target)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
            else:
                return
        make_whiteout(found.name, dir_fd=target)

    def _file(self, found: Found, path: str, target: int) -> None:
        status = found.status
        file = status.st_dev, status.st_ino
        if status.st_nlink >= _MANY:
            self._copies.setdefault(file, path if status.st_nlink >= _TOO_MANY else None)
        first = self._copies.get(file)
        if first is None:
            try:
                _link(found, target)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                first = self._copies[file] = path  # a filesystem with a lower limit
            else:
                return
        if first == path:
            self._copy(found, target)
        else:
            self._link_to_copy(first, found.name, target)

    def _copy(self, found: Found, target: int) -> None:
        left_out = {kind: count for kind, count in self._copier.skipped.items() if kind in ("device", "socket")}
        self._copier.entry(found.dir_fd, found.name, target, found.name)
        if any(self._copier.skipped.get(kind, 0) > left_out.get(kind, 0) for kind in ("device", "socket")):
            raise OSError(errno.EMLINK, "a file has too many names, and cannot be copied", found.name)

    def _link_to_copy(self, first: str, name: str, target: int) -> None:
        above, slash, last = first.rpartition("/")
        directory = files.open_beneath(above, OPEN_DIRECTORY, dir_fd=self._top, resolve=0) if slash else self._top
        try:
            os.link(last, name, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=False)
        finally:
            if directory != self._top:
                os.close(directory)


def _link(found: Found, target: int) -> None:
    os.link(found.name, found.name, src_dir_fd=found.dir_fd, dst_dir_fd=target, follow_symlinks=False)


def _unimplemented(path: str, what: str) -> errors.Unimplemented:
    return errors.Unimplemented(
        f"cannot merge layers with {what}: {shown(path)}", key=path, hint="squash them, which writes such files in full"
    )
