"""The layer that an archive is written into, as the archive's entries see it: part of the merged tree.

Whiteouts must not remove what the archive itself put there, so that is known of every file. In a layer that was empty
at the start, it is everything except the few files that are made here implicitly; in any other layer, the paths of the
archive's entries are kept in memory.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from onlap import errors
from onlap.errors import shown
from onlap.layers import paths
from onlap.layers.apply.attributes import IMPLICIT_MODE, Attributes
from onlap.layers.apply.directories import Directories, Directory
from onlap.layers.apply.lowers import Lowers
from onlap.layers.format.tar import Entry
from onlap.overlayfs.markers import OPAQUE_YES, Markers, get_xattr, is_whiteout, set_opaque
from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.remove import remove as remove_tree
from onlap.trees.walk import NEW_FILE, OPEN_FILE, path_of, walk

# path_resolution(7): the kernel's limit.
_MAX_SYMLINKS = 40


class Upper:
    """A layer being written.

    Args:
        layer: a descriptor of its top directory, open for reading; left open.
        lowers: the layers below, topmost first.
        markers: how whiteouts are written; None: the layer is a whole tree, and whiteouts only remove from it.
        attributes: sets attributes.

    Attributes:
        directories: the open directories.
        top: the top directory.
        lowers: the layers below.
        attributes: sets attributes.
        tracking: whether the layer was not empty at the start: then :meth:`mark_made` must be called for every entry.
        top_described: whether the archive describes the top directory.
        followed: symlinks from before the archive on the paths of its entries.
    """

    def __init__(self, layer: int, lowers: Sequence[str], markers: Markers | None, attributes: Attributes) -> None:
        self.tracking = bool(files.list_directory(layer))
        self._markers = markers
        self.lowers = Lowers(lowers, markers)
        try:
            self.directories = Directories(layer, check_acl=self.tracking)
            if self.tracking and self.lowers:
                self._note_markers(layer)
        except BaseException:
            self.lowers.close()
            raise
        self.top = self.directories.top
        self.attributes = attributes
        self._copier = Copier()
        self.top_described = False
        # If the layer was not empty at the start: what the archive made. Otherwise: what it did not make, except
        # whiteouts.
        self._made = paths.PathSet()
        self._not_made = paths.PathSet()
        self.followed = paths.PathSet()

    def _note_markers(self, layer: int) -> None:
        """Find out what a layer that was not empty hides of those below."""
        assert self._markers is not None
        for found in walk(layer, ordered=False):
            if not stat.S_ISDIR(found.status.st_mode):
                continue
            path = path_of(found.dir_fd, found.name)
            if get_xattr(path, self._markers.redirect) is not None:
                raise errors.Unimplemented(
                    f"{shown(found.path)} in the layer was renamed, and nothing can be applied on top of that",
                    key=found.path,
                    hint="commit the layer, and apply to a new one",
                )
            if get_xattr(path, self._markers.opaque) == OPAQUE_YES:
                self.lowers.hide(found.path)

    def close(self) -> None:
        """Close everything; after an error, restore the directories' attributes as far as possible."""
        self.directories.close(ignore_errors=True)
        self.lowers.close()

    def finish(self) -> None:
        """Give all directories their final attributes."""
        self.directories.close()
        for kind, count in self._copier.skipped.items():
            self.attributes.skipped[kind] += count

    # What the archive made

    def mark_made(self, path: str) -> None:
        """Note that the archive made the file at ``path``."""
        self._made.add(path)

    def mark_described(self, path: str) -> None:
        """Note that the archive describes the directory at ``path``."""
        self._not_made.discard(path)

    def is_made(self, path: str) -> bool:
        """Whether the archive made the layer's file at ``path``, which is not a whiteout."""
        return path in self._made if self.tracking else path not in self._not_made

    def forget(self, path: str) -> None:
        """Note that ``path`` and everything below it was removed."""
        self._made.discard_below(path)
        self._not_made.discard_below(path)
        self.lowers.show(path)

    def describe_top(self, entry: Entry) -> None:
        """Give the top directory the attributes of an entry."""
        self.attributes.set_directory(self.top, entry, fresh=False)
        if self.top.acl is not None:
            self.directories.check_acl = True
        self.top_described = True

    # Finding the place of an entry

    def parent(self, path: str) -> Directory:
        """The directory for entries whose parent is called ``path``; made if missing.

        Raises:
            ValueError: the path cannot be resolved.
            OSError: it cannot be made.
        """
        found = self.directories.find(path)
        if isinstance(found, Directory):
            return found
        resolved = self._resolve(path, create=True)
        found = self.directories.find(resolved) if resolved is not None else None
        if not isinstance(found, Directory):
            raise ValueError("its parent directory vanished while it was written")
        return found

    def link_source(self, target: str) -> tuple[Directory, str] | None:
        """The target of a hard link in the layer; copied up if only a layer below has it.

        Raises:
            ValueError: the path cannot be resolved.
            OSError: it cannot be copied.
        """
        parent_path, _, base = target.rpartition("/")
        resolved = self._resolve(parent_path, create=False)
        if resolved is None:
            return None
        parent = self.directories.find(resolved)
        if isinstance(parent, Directory):
            status = parent.status(base)
            if status is not None:
                return None if is_whiteout(status) else (parent, base)
        found = self.lowers.lookup(resolved, base)
        if found is None or stat.S_ISDIR(found.status.st_mode):
            return None
        parent = self.ensure(resolved)
        self._copy_up(parent, base)
        return parent, base

    def _resolve(self, path: str, *, create: bool) -> str | None:
        """Resolve the path of a directory in the merged tree to one without symlinks.

        Absolute symlinks start at the tree's top, and ``..`` ends there, as for a process with the tree as its root.

        Args:
            path: the path in the archive.
            create: make missing directories; otherwise the result is None if one is missing.
        """
        pending = path.split("/")[::-1]
        here = self._skip_existing("", pending)
        links = 0
        while pending:
            name = pending.pop()
            if not name or name == ".":
                continue
            if name == "..":
                here = here.rpartition("/")[0]
                continue
            child = paths.join(here, name)
            target = self._step(here, name, child, create)
            if target is None:
                return None
            if not target:
                here = child
                continue
            links += 1
            if links > _MAX_SYMLINKS:
                raise ValueError("too many symlinks on its path")
            pending += target.split("/")[::-1]
            here = self._skip_existing("" if target.startswith("/") else here, pending)
        return here

    def _skip_existing(self, here: str, pending: list[str]) -> str:
        """Remove the names of existing directories of the layer from the end of ``pending``; return their path.

        By bisection, so that the cost of a very deep path grows with its length, not with the square of it.

        Raises:
            ValueError: the rest is longer than a path may be.
        """
        names = list(itertools.takewhile(lambda name: name not in ("", ".", ".."), reversed(pending)))
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if isinstance(self.directories.find(paths.join(here, "/".join(names[:middle]))), Directory):
                low = middle
            else:
                high = middle - 1
        if low:
            del pending[-low:]
            here = paths.join(here, "/".join(names[:low]))
        if ".." not in pending:
            paths.check_length(paths.join(here, "/".join(pending)))
        return here

    def _step(self, here: str, name: str, child: str, create: bool) -> str | None:
        """Resolve one name.

        Returns:
            The target of a symlink; an empty string for an existing or new directory; None if the directory is missing
            and not to be made.
        """
        if isinstance(self.directories.find(child), Directory):
            return ""
        upper = self.directories.find(here)
        status = upper.status(name) if isinstance(upper, Directory) else None
        if status is None:
            found = self.lowers.lookup(here, name)
            if found is not None and stat.S_ISLNK(found.status.st_mode):
                if create:
                    self.followed.add(child)
                return os.readlink(found.name, dir_fd=found.dir_fd)
            if create:
                self._make_missing(self.ensure(here), name)
                return ""
            return "" if found is not None and stat.S_ISDIR(found.status.st_mode) else None
        assert isinstance(upper, Directory)
        if stat.S_ISLNK(status.st_mode):
            if create and not self.is_made(child):
                self.followed.add(child)
            return os.readlink(name, dir_fd=upper.fd)
        if not create:
            return None
        if not is_whiteout(status) and self.is_made(child):
            raise ValueError(f"{shown(child)} on its path is not a directory")
        directory, _ = self.replace_by_directory(upper, name, child)
        self._make_implicit(directory, None)
        return ""

    def ensure(self, path: str) -> Directory:
        """The directory at ``path``, which exists in the merged tree; made in the layer if missing."""
        found = self.directories.find(path)
        if isinstance(found, Directory):
            return found
        here = ""
        directory = self.top
        for name in path.split("/"):
            here = paths.join(here, name)
            found = self.directories.find(here)
            directory = found if isinstance(found, Directory) else self._make_missing(directory, name)
        return directory

    def _make_missing(self, parent: Directory, name: str) -> Directory:
        """Make a directory that the archive does not describe: like the one below, otherwise root's."""
        if name.startswith(paths.WHITEOUT_PREFIX):
            raise ValueError(f"a directory cannot be called {shown(name)}")
        path = paths.join(parent.path, name)
        paths.check_length(path)
        below = self.lowers.directory(path)
        # A duplicate: making the directory may close other descriptors.
        source = os.dup(below.parts[0].fd) if below is not None else None
        try:
            directory = self.directories.make(parent, name, IMPLICIT_MODE)
            self._make_implicit(directory, source)
        finally:
            if source is not None:
                os.close(source)
        return directory

    def _make_implicit(self, directory: Directory, source: int | None) -> None:
        self._not_made.add(directory.path)
        if source is None:
            self.attributes.reset_directory(directory)
        else:
            self._copy_attributes(source, directory)

    def inherit_top(self) -> None:
        """Give the top directory the attributes of the one below, as a new snapshot has them from the start."""
        below = self.lowers.directory("")
        if below is not None:
            self._copy_attributes(below.parts[0].fd, self.top)

    def _copy_attributes(self, source: int, directory: Directory) -> None:
        self._copier.attributes(source, directory.fd)
        status = os.fstat(directory.fd)
        directory.times = (status.st_atime_ns, status.st_mtime_ns)
        directory.own_group = status.st_gid == self.attributes.gid
        directory.dirty = True
        if self.attributes.uid and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            directory.mode = stat.S_IMODE(status.st_mode)
            os.chmod(directory.fd, directory.mode | stat.S_IRWXU)
        directory.acl = None
        if directory.hold_acl():
            self.directories.check_acl = True

    def _copy_up(self, parent: Directory, base: str) -> None:
        """Copy a file of a layer below into this one, as writing to it through a mount would."""
        path = paths.join(parent.path, base)
        below = self.lowers.directory(parent.path)
        found = None if below is None else below.lookup(base)
        if below is None or found is None:
            raise ValueError(f"{shown(path)} vanished from the layers below")
        parent.dirty = True
        self._not_made.add(path)
        if not stat.S_ISREG(found.status.st_mode):
            self._copier.entry(found.dir_fd, base, parent.fd, base)
            return
        with ExitStack() as stack:
            meta = os.open(base, OPEN_FILE, dir_fd=found.dir_fd)
            stack.callback(os.close, meta)
            data = below.data(found, path)
            stack.callback(os.close, data)
            target = os.open(base, NEW_FILE, 0o600, dir_fd=parent.fd)
            stack.callback(os.close, target)
            self._copier.content(data, target, os.fstat(data))
            self._copier.attributes(meta, target)

    # Making room for an entry

    def remove(self, parent: Directory, base: str, path: str) -> None:
        """Remove the layer's file or directory at ``path`` with its contents."""
        status = parent.status(base)
        if status is None:
            return
        parent.dirty = True
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(base, dir_fd=parent.fd)
            self.forget(path)
            return
        self.directories.close_below(path, forget=True)
        remove_tree(parent.fd, base)
        self.forget(path)

    def replace_by_directory(self, parent: Directory, base: str, path: str) -> tuple[Directory, bool]:
        """Replace a file by a directory, or open an existing directory; return whether it was made."""
        found = self.directories.find(path)
        if isinstance(found, Directory):
            return found, False
        self.remove(parent, base, path)
        directory = self.directories.make(parent, base, IMPLICIT_MODE)
        # The replaced file hid a directory below, and so must this.
        self.make_opaque(directory)
        return directory, True

    def make_opaque(self, directory: Directory) -> None:
        """Make a directory hide the layers' directory at its path, if there is one."""
        if self._markers is not None and self.lowers.directory(directory.path) is not None:
            set_opaque(directory.fd, self._markers)
            self.lowers.hide(directory.path)
