"""The layer that an archive is written into, as the archive's entries see it: part of the merged tree.

It is known of everything in the layer whether the archive put it there, since whiteouts must not remove that. In a
layer that was empty at the start that is all but the little that is made here on the way; in one that was not, the
paths of the archive's entries are kept in memory.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence

from onlap import errors
from onlap.errors import shown
from onlap.layers import paths
from onlap.layers.apply.attributes import IMPLICIT_MODE, Attributes
from onlap.layers.apply.directories import Directories, Directory
from onlap.layers.apply.lowers import Lowers
from onlap.layers.format.tar import Entry
from onlap.overlayfs.markers import OPAQUE_YES, Markers, get_xattr, is_whiteout, set_opaque
from onlap.overlayfs.merged import Found
from onlap.syscalls import files
from onlap.trees.copy import Copier, copy_range, data_ranges
from onlap.trees.remove import remove as remove_tree
from onlap.trees.walk import path_of, walk

# path_resolution(7): the kernel follows as many.
_MAX_SYMLINKS = 40

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Upper:
    """A layer being written.

    Args:
        layer: a descriptor of its top directory, open for reading; left open.
        lowers: the layers below, topmost first.
        markers: how whiteouts are written; None: the layer is a whole tree, and whiteouts only remove from it.
        attributes: what may be set.

    Attributes:
        directories: those that are open.
        top: the top one.
        lowers: what lies below.
        attributes: what may be set.
        tracking: whether the layer was not empty at the start, so that :meth:`own` must be told of every entry.
        top_named: whether the archive describes the top directory.
        followed: symlinks that were there before the archive and that entries were put through.
    """

    def __init__(self, layer: int, lowers: Sequence[str], markers: Markers | None, attributes: Attributes) -> None:
        self.tracking = bool(files.list_directory(layer))
        self.lowers = Lowers(lowers, markers)
        self.directories = Directories(layer, check_acl=self.tracking)
        self.top = self.directories.top
        self._markers = markers
        if self.tracking and self.lowers:
            self._note_markers(layer)
        self.attributes = attributes
        self._copier = Copier()
        self.top_named = False
        # Not empty at the start: what the archive made. Else: what it did not, apart from whiteouts.
        self._own = paths.PathSet()
        self._borrowed = paths.PathSet()
        self.followed = paths.PathSet()

    def _note_markers(self, layer: int) -> None:
        """Learn what a layer that was written already hides of those below."""
        assert self._markers is not None
        for found in walk(layer, ordered=False):
            if not stat.S_ISDIR(found.status.st_mode):
                continue
            path = path_of(found.dir_fd, found.name)
            if get_xattr(path, self._markers.redirect) is not None:
                raise errors.Unimplemented(
                    f"{shown(found.path)} of the layer was renamed, and nothing can be applied onto that",
                    key=found.path,
                    hint="commit the layer, and apply onto a new one",
                )
            if get_xattr(path, self._markers.opaque) == OPAQUE_YES:
                self.lowers.hide(found.path)

    def close(self) -> None:
        """Close what is open; after an error directories get back, as far as can be, what was taken from them."""
        self.directories.close(forget=True)
        self.lowers.close()

    def finish(self) -> None:
        """Give all directories the attributes that they must have."""
        self.directories.close()
        for kind, count in self._copier.skipped.items():
            self.attributes.skipped[kind] += count

    # What the archive made

    def own(self, path: str) -> None:
        """The archive made what is at ``path``."""
        self._own.add(path)

    def named(self, path: str) -> None:
        """The archive describes the directory at ``path``."""
        self._borrowed.discard(path)

    def is_own(self, path: str) -> bool:
        """Whether the archive made what the layer has at ``path``, which is not a whiteout."""
        return path in self._own if self.tracking else path not in self._borrowed

    def forget(self, path: str) -> None:
        """Nothing is left at ``path`` and below."""
        self._own.discard_below(path)
        self._borrowed.discard_below(path)
        self.lowers.show(path)

    def name_top(self, entry: Entry) -> None:
        """The archive describes the top directory."""
        self.attributes.set_directory(self.top, entry, fresh=False)
        if self.top.acl is not None:
            self.directories.check_acl = True
        self.top_named = True

    # The way to an entry

    def parent(self, path: str) -> Directory:
        """The directory that an entry whose parent is called ``path`` goes to, made if need be.

        Raises:
            ValueError: there is no way to it.
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
        """Where a hard link's target is in the layer; copied up when only a layer below has it.

        Raises:
            ValueError: there is no way to it.
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
        """Where the directory called ``path`` is in the merged tree, as a path without symlinks.

        Absolute symlinks start at the tree's top, and ``..`` ends there, as for a process whose root the tree is.

        Args:
            path: its name.
            create: make what is missing; else None is the answer to it.
        """
        pending = path.split("/")[::-1]
        here = self._passed("", pending)
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
                raise ValueError("too many symlinks on the way to it")
            pending += target.split("/")[::-1]
            here = self._passed("" if target.startswith("/") else here, pending)
        return here

    def _passed(self, here: str, pending: list[str]) -> str:
        """Take from the end of ``pending`` the names that lead through directories of the layer; where they lead.

        By halves, so that a name of very many directories costs as much as its length, not as the square of it.

        Raises:
            ValueError: what is left is longer than a path may be.
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
        """One name on the way.

        Returns:
            The target of a symlink; nothing for a directory, also one that was made; None when there is none and none
            is to be made.
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
                self._implicit(self.ensure(here), name)
                return ""
            return "" if found is not None and stat.S_ISDIR(found.status.st_mode) else None
        assert isinstance(upper, Directory)
        if stat.S_ISLNK(status.st_mode):
            if create and not self.is_own(child):
                self.followed.add(child)
            return os.readlink(name, dir_fd=upper.fd)
        if not create:
            return None
        if not is_whiteout(status) and self.is_own(child):
            raise ValueError(f"{shown(child)} on the way to it is not a directory")
        directory, _ = self.replace_by_directory(upper, name, child)
        self._make_implicit(directory, None)
        return ""

    def ensure(self, path: str) -> Directory:
        """The directory at ``path``, which is one in the merged tree; made in the layer if need be."""
        found = self.directories.find(path)
        if isinstance(found, Directory):
            return found
        here = ""
        directory = self.top
        for name in path.split("/"):
            here = paths.join(here, name)
            found = self.directories.find(here)
            directory = found if isinstance(found, Directory) else self._implicit(directory, name)
        return directory

    def _implicit(self, parent: Directory, name: str) -> Directory:
        """Make a directory that the archive has not named: like the one below, else root's."""
        if name.startswith(paths.WHITEOUT_PREFIX):
            raise ValueError(f"a directory cannot be called {shown(name)}")
        path = paths.join(parent.path, name)
        paths.check_length(path)
        below = self.lowers.directory(path)
        # A descriptor of our own: making the directory may close others.
        source = os.dup(below.parts[0].fd) if below is not None else None
        try:
            directory = self.directories.make(parent, name, IMPLICIT_MODE)
            self._make_implicit(directory, source)
        finally:
            if source is not None:
                os.close(source)
        return directory

    def _make_implicit(self, directory: Directory, source: int | None) -> None:
        self._borrowed.add(directory.path)
        if source is None:
            self.attributes.reset_directory(directory)
            return
        self._copy_attributes(source, directory)

    def inherit_top(self) -> None:
        """Give the top directory the attributes of the one below, as a snapshot's has them from the start."""
        below = self.lowers.directory("")
        if below is not None:
            self._copy_attributes(below.parts[0].fd, self.top)

    def _copy_attributes(self, source: int, directory: Directory) -> None:
        self._copier.directory_attributes(source, directory.fd)
        status = os.fstat(directory.fd)
        directory.times = (status.st_atime_ns, status.st_mtime_ns)
        directory.plain_group = status.st_gid == self.attributes.gid
        directory.dirty = True
        if self.attributes.uid and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            directory.mode = stat.S_IMODE(status.st_mode)
            os.chmod(directory.fd, directory.mode | stat.S_IRWXU)
        directory.acl = None
        if directory.hold_acl():
            self.directories.check_acl = True

    def _copy_up(self, parent: Directory, base: str) -> None:
        """Bring a file of a layer below into this one, as writing to it through a mount would."""
        path = paths.join(parent.path, base)
        below = self.lowers.directory(parent.path)
        found = None if below is None else below.lookup(base)
        if below is None or found is None:
            raise ValueError(f"{shown(path)} vanished from the layers below")
        parent.dirty = True
        self._borrowed.add(path)
        if not stat.S_ISREG(found.status.st_mode):
            self._copier.entry(found.dir_fd, base, parent.fd, base)
            return
        meta = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.dir_fd)
        try:
            data = below.data(found, path)
            try:
                self._copy_file(data, meta, found, parent, base)
            finally:
                os.close(data)
        finally:
            os.close(meta)

    def _copy_file(self, data: int, meta: int, found: Found, parent: Directory, base: str) -> None:
        target = os.open(base, _CREATE, 0o600, dir_fd=parent.fd)
        try:
            size = found.status.st_size
            for start, end in data_ranges(data, size):
                copy_range(data, target, start, end)
            os.ftruncate(target, size)
            self._copier.directory_attributes(meta, target)
        finally:
            os.close(target)

    # Room for an entry

    def remove(self, parent: Directory, base: str, path: str) -> None:
        """Remove what the layer has at ``path``, with all below it."""
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
        """Make a directory where something is, or open it if it is one; says whether it was made."""
        found = self.directories.find(path)
        if isinstance(found, Directory):
            return found, False
        self.remove(parent, base, path)
        directory = self.directories.make(parent, base, IMPLICIT_MODE)
        # What stood here hid a directory below, and so must this.
        self.make_opaque(directory)
        return directory, True

    def make_opaque(self, directory: Directory) -> None:
        """Make a directory hide what the layers below have there, if they have a directory there."""
        if self._markers is not None and self.lowers.directory(directory.path) is not None:
            set_opaque(directory.fd, self._markers)
            self.lowers.hide(directory.path)
