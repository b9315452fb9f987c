"""Writing the entries of an archive into a layer's directory, one after the other.

Each entry sees the layer merged with those below it: its path may lead through directories and symlinks of the merged
tree, but never out of it, and the kernel itself never follows a symlink.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from onlap import errors
from onlap.errors import shown
from onlap.layers import paths
from onlap.layers.apply.attributes import Attributes
from onlap.layers.apply.directories import Directory
from onlap.layers.apply.upper import Upper
from onlap.layers.apply.whiteouts import Whiteouts
from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import Entry
from onlap.overlayfs.markers import Markers
from onlap.trees.walk import NEW_FILE, opened, path_of

_EXACT = 0o777
# First characters of a name that needs a closer look: there is none, or it may be ".", ".." or that of a whiteout.
_UNUSUAL = ("", ".")
# A path of fewer characters (of at most four bytes each) is not too long, whatever name is added to it.
_SURELY_SHORT = tar.MAX_PATH // 4 - 255

# include/linux/kdev_t.h: a device number in the kernel has 12 bits for the major and 20 for the minor number.
_MAX_MAJOR = (1 << 12) - 1
_MAX_MINOR = (1 << 20) - 1


class Applier:
    """Writes one archive into a layer.

    Args:
        reader: provides the data of the entries.
        layer: a descriptor of the layer's top directory, open for reading.
        lowers: the layers below, topmost first.
        markers: how whiteouts are written; None: the layer is a whole tree, and whiteouts remove files from it.
        recorded: whether owners that cannot be set are recorded in an xattr.

    Attributes:
        attributes: counts what could not be kept.
        upper: the layer.
    """

    def __init__(
        self, reader: TarReader, layer: int, lowers: Sequence[str], markers: Markers | None, *, recorded: bool
    ) -> None:
        self._reader = reader
        self.attributes = Attributes(recorded=recorded)
        self.upper = Upper(layer, lowers, markers, self.attributes)
        self._whiteouts = Whiteouts(self.upper)
        # The name of the parent of the last entry, as the archive has it, if the next entry may go there; else None.
        self._above: str | None = None
        self._parent = self.upper.top
        self._parent.pins += 1
        # open(2) and mkdir(2) set modes without these bits exactly.
        self._inexact = self.attributes.umask | 0o7000
        self._handlers: dict[str, Callable[[Directory, str, Entry], None]] = {
            tar.FILE: self._file,
            tar.DIRECTORY: self._directory,
            tar.SYMLINK: self._symlink,
            tar.HARDLINK: self._hardlink,
            tar.CHAR: self._device,
            tar.BLOCK_DEVICE: self._device,
            tar.FIFO: self._fifo,
        }

    def entry(self, entry: Entry) -> None:
        """Write one entry.

        Raises:
            InvalidArgument: the entry cannot be what an honest archive holds.
            DataLoss: the archive ends in its data.
            OnlapError: of another kind, for other errors of the kernel.
        """
        try:
            self._entry(entry)
        except OSError as error:
            raise errors.from_oserror(error, doing=f"apply {shown(entry.name)}", key=entry.name) from error
        except ValueError as error:
            if isinstance(error, errors.OnlapError):
                raise
            raise tar.bad(str(error), entry.name, entry.offset) from error

    def finish(self) -> None:
        """Give all directories their final attributes.

        Raises:
            OnlapError: they cannot be set.
        """
        with errors.translated("finish the layer"):
            self.upper.finish()

    def close(self) -> None:
        """Close everything; the layer stays as it is."""
        self.upper.close()

    def _entry(self, entry: Entry) -> None:
        for kind in entry.skipped:
            self.attributes.skipped[kind] += 1
        above, _, base = entry.name.removesuffix("/").rpartition("/")
        # The fast path is an ordinary name in the directory of the last entry.
        if above != self._above or base[:1] in _UNUSUAL or entry.type == tar.CHAR:
            found = self._find(entry, above, base)
            if found is None:
                return
            base = found
        parent = self._parent
        parent.dirty = True
        self._handlers[entry.type](parent, base, entry)
        if self.upper.tracking:
            self.upper.mark_made(paths.join(parent.path, base))

    def _find(self, entry: Entry, above: str, last: str) -> str | None:
        """Go to the parent of an entry, or finish an entry that has none.

        Args:
            entry: the entry.
            above: its name up to the last slash, apart from one at its end.
            last: what follows.

        Returns:
            Its name in the parent; None if the entry is done, since it is a whiteout or the top directory.
        """
        if not entry.name:
            raise ValueError("it has no name")
        path = paths.clean(entry.name)
        parent_path, _, base = path.rpartition("/")
        self._above = None
        if ".wh." in path and self._whiteout(path, parent_path, base):
            return None
        if not path:
            if entry.type != tar.DIRECTORY:
                raise ValueError("only a directory can be the top")
            self.upper.describe_top(entry)
            return None
        if entry.type == tar.CHAR and not entry.devmajor and not entry.devminor:
            # A whiteout in OverlayFS's form.
            self._whiteouts.whiteout(parent_path, base)
            return None
        parent = self.upper.parent(parent_path)
        # Entries in it may open any number of other directories.
        self._parent.pins -= 1
        parent.pins += 1
        self._parent = parent
        if parent.path != parent_path:
            paths.check_length(paths.join(parent.path, base))
        if base == last and len(parent.path) < _SURELY_SHORT:
            self._above = above
        return base

    def _whiteout(self, path: str, parent: str, base: str) -> bool:
        """Handle a path with ``.wh.`` in it; return False if it is not a whiteout."""
        names = path.split("/")
        if base == paths.OPAQUE and not any(name.startswith(paths.WHITEOUT_PREFIX) for name in names[:-1]):
            self._whiteouts.opaque(parent)
            return True
        if any(name.startswith(paths.AUFS_PREFIX) for name in names):
            return True  # AUFS's own files
        if any(name.startswith(paths.WHITEOUT_PREFIX) for name in names[:-1]):
            raise ValueError("a whiteout is not a directory")
        if not base.startswith(paths.WHITEOUT_PREFIX):
            return False
        self._whiteouts.whiteout(parent, paths.whited_out(base))
        return True

    def _make_room(self, parent: Directory, base: str) -> None:
        # The cached parent may be in what is removed, or its path may lead elsewhere now.
        self._above = None
        self.upper.remove(parent, base, paths.join(parent.path, base))

    def _replacing(self, parent: Directory, base: str, make: Callable[[], None]) -> None:
        """Make a file; remove what is in its place first, if anything is."""
        try:
            make()
        except FileExistsError:
            self._make_room(parent, base)
            make()

    # Types

    def _file(self, parent: Directory, base: str, entry: Entry) -> None:
        mode = entry.mode
        attributes = self.attributes
        own = entry.uid == attributes.uid and entry.gid == attributes.gid
        # Setting an xattr needs a file that its owner may write to.
        plain = not entry.xattrs and (own or attributes.may_chown)
        create = mode & _EXACT if plain else 0o600
        try:
            fd = os.open(base, NEW_FILE, create, dir_fd=parent.fd)
        except FileExistsError:
            self._make_room(parent, base)
            fd = os.open(base, NEW_FILE, create, dir_fd=parent.fd)
        try:
            if entry.sparse is not None:
                self._write_sparse(fd, entry)
            else:
                left = entry.size
                while left:
                    data = self._reader.piece()
                    left -= len(data)
                    written = os.write(fd, data)
                    while written < len(data):
                        written += os.write(fd, data[written:])
            if not own:
                attributes.chown(fd, entry)
            elif not parent.own_group:
                os.chown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                attributes.set_xattrs(fd, entry)
            if not plain or mode & self._inexact:
                os.chmod(fd, mode)
            mtime = entry.mtime_ns
            os.utime(fd, ns=(mtime if entry.atime_ns is None else entry.atime_ns, mtime))
        finally:
            os.close(fd)

    def _write_sparse(self, fd: int, entry: Entry) -> None:
        assert entry.sparse is not None
        os.ftruncate(fd, entry.size)
        data = self._reader.piece()
        for offset, length in entry.sparse:
            while length:
                if not data:
                    data = self._reader.piece()
                written = os.pwrite(fd, data[:length], offset)
                data = data[written:]
                offset += written
                length -= written

    def _directory(self, parent: Directory, base: str, entry: Entry) -> None:
        try:
            directory = self.upper.directories.make(parent, base, entry.mode & _EXACT)
            fresh = True
        except FileExistsError:
            self._above = None
            directory, fresh = self.upper.replace_by_directory(parent, base, paths.join(parent.path, base))
        self.attributes.set_directory(directory, entry, fresh=fresh, own=fresh and parent.own_group)
        if directory.acl is not None:
            self.upper.directories.check_acl = True
        self.upper.mark_described(directory.path)

    def _symlink(self, parent: Directory, base: str, entry: Entry) -> None:
        if not entry.linkname:
            raise ValueError("a symlink to nothing")
        self._replacing(parent, base, lambda: os.symlink(entry.linkname, base, dir_fd=parent.fd))
        self._finish_node(parent, base, entry)

    def _hardlink(self, parent: Directory, base: str, entry: Entry) -> None:
        try:
            target = paths.clean(entry.linkname)
        except ValueError as error:
            raise ValueError(f"its target {shown(entry.linkname)}: {error}") from None
        if not target or any(name.startswith(paths.WHITEOUT_PREFIX) for name in target.split("/")):
            raise ValueError(f"a hard link to {shown(entry.linkname)}")
        source = self.upper.link_source(target)
        if source is None:
            raise ValueError(f"its target {shown(entry.linkname)} does not exist")
        if source == (parent, base):
            return  # a link to itself
        self._link(*source, parent, base)

    def _link(self, source: Directory, source_base: str, parent: Directory, base: str) -> None:
        status = source.status(source_base)
        if status is None or stat.S_ISDIR(status.st_mode):
            raise ValueError("a hard link to a directory")
        if paths.is_below(source.path, paths.join(parent.path, base)):
            raise ValueError("a hard link that would replace the directory of its target")
        self._replacing(
            parent,
            base,
            lambda: os.link(source_base, base, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False),
        )

    def _device(self, parent: Directory, base: str, entry: Entry) -> None:
        major, minor = entry.devmajor, entry.devminor
        if not 0 <= major <= _MAX_MAJOR or not 0 <= minor <= _MAX_MINOR:
            raise ValueError(f"the device number {major},{minor} is out of range")
        kind = stat.S_IFCHR if entry.type == tar.CHAR else stat.S_IFBLK
        try:
            self._make_node(parent, base, kind | entry.mode & _EXACT, os.makedev(major, minor))
        except PermissionError:
            self.attributes.skipped["device"] += 1
        else:
            self._finish_node(parent, base, entry)

    def _fifo(self, parent: Directory, base: str, entry: Entry) -> None:
        self._make_node(parent, base, stat.S_IFIFO | entry.mode & _EXACT, 0)
        self._finish_node(parent, base, entry)

    def _make_node(self, parent: Directory, base: str, mode: int, device: int) -> None:
        self._replacing(parent, base, lambda: os.mknod(base, mode, device, dir_fd=parent.fd))

    def _finish_node(self, parent: Directory, base: str, entry: Entry) -> None:
        """Set the attributes of a file that is not opened: owner, xattrs, mode, times, in an order that keeps each."""
        attributes = self.attributes
        if not attributes.is_own(entry):
            attributes.chown(base, entry, dir_fd=parent.fd)
        elif not parent.own_group:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)
        if entry.xattrs:
            attributes.set_xattrs(path_of(parent.fd, base), entry)
        if entry.type != tar.SYMLINK and entry.mode & self._inexact:
            # Before Linux 6.6, fchmodat(2) follows symlinks; a descriptor of the file itself cannot lead elsewhere.
            with opened(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd) as fd:
                os.chmod(f"/proc/self/fd/{fd}", entry.mode)
        mtime = entry.mtime_ns
        atime = mtime if entry.atime_ns is None else entry.atime_ns
        os.utime(base, ns=(atime, mtime), dir_fd=parent.fd, follow_symlinks=False)
