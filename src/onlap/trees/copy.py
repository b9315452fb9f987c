"""Copying a tree completely: owners, modes, times, xattrs, hard links, holes; with reflinks where supported.

What cannot be kept is counted in the result, not just logged.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from onlap import errors
from onlap.arguments import check_texts
from onlap.errors import shown
from onlap.overlayfs.markers import is_marker
from onlap.syscalls import files
from onlap.trees.meta import OVERRIDE_XATTR, drop_acls, format_override, list_xattrs
from onlap.trees.remove import remove
from onlap.trees.walk import NEW_FILE, OPEN_DIRECTORY, OPEN_FILE, Descent, open_on_mount, opened, path_of

_CHUNK = 256 * 1024
# Bytes per copy_file_range(2): enough that the cost of the call does not matter, little enough that a signal or a
# callback need not wait for a whole disk image.
_RANGE = 64 * 1024 * 1024
# Files of this size may have holes even if they have as many blocks as bytes.
_MAY_HAVE_HOLES = 1 << 20
_READ = OPEN_FILE | os.O_NONBLOCK
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_NO_XATTR = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


class Copied(NamedTuple):
    """The result of a copy.

    Attributes:
        entries: the number of files made, including directories and links.
        size: bytes of content.
        skipped: the number of each kind that could not be kept: ``socket``, ``device``, ``owner`` (recorded in an xattr
            instead), ``xattr``, ``mountpoint`` (made as an empty directory).
    """

    entries: int
    size: int
    skipped: dict[str, int]


class Copier:
    """The copy of one tree, and its state.

    Args:
        allow_changes: let files change while they are read.
        exclude: :mod:`fnmatch` patterns for the path from the top or the last name; matching files are left out with
            everything below them.
        avoid: directories, as ``(st_dev, st_ino)``, to leave out with everything below them.
        keep_markers: copy OverlayFS's own xattrs, as the copy of a layer needs; otherwise they are left out.
        leave_out: names of further xattrs to leave out.
        merge: the target may hold files: a directory is merged with one of the same name, anything else is replaced.
        link: make files hard links of the source's files, instead of copies.
        progress: called with the entries and bytes done; an exception from it aborts the copy.
    """

    def __init__(
        self,
        *,
        allow_changes: bool = False,
        exclude: Collection[str] = (),
        avoid: Collection[tuple[int, int]] = (),
        keep_markers: bool = False,
        leave_out: Collection[str] = (),
        merge: bool = False,
        link: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._allow_changes = allow_changes
        check_texts(exclude, "list of patterns to exclude")
        self._exclude = tuple(exclude)
        self._avoid = frozenset(avoid)
        self._keep_markers = keep_markers
        self._leave_out = frozenset(leave_out)
        self._merge = merge
        self._hard_links = link
        self._progress = progress
        self._skipped: Counter[str] = Counter()
        self._entries = 0
        self._size = 0
        self._linked: dict[tuple[int, int], str] = {}
        self._clone = True
        self._set_owner = True
        self._top = -1

    def tree(self, source: int, target: int) -> Copied:
        """Copy the contents of the directory ``source`` into the directory ``target``, and its attributes.

        Args:
            source: a descriptor of a directory, open for reading.
            target: a descriptor of a directory, open for reading; empty, unless trees are to be merged.

        Raises:
            FailedPrecondition: a file changed while it was read.
            OSError: something cannot be read or written.
        """
        self._top = target
        # New files would inherit them; the target gets those of the source at the end.
        drop_acls(target)
        sources, targets = Descent(source), Descent(target)
        stack = [("", _names(source))]
        try:
            while stack:
                prefix, names = stack[-1]
                for name in names:
                    path = prefix + name
                    below = self._entry(sources.fd, targets.fd, name, path)
                    if below is not None:
                        try:
                            sources.enter(below[0])
                        except OSError:
                            os.close(below[1])
                            raise
                        targets.enter(below[1])
                        stack.append((path + "/", _names(below[0])))
                        break
                else:
                    self._attributes(sources.fd, targets.fd, os.fstat(sources.fd))
                    stack.pop()
                    if stack:
                        sources.leave()
                        targets.leave()
        finally:
            sources.close()
            targets.close()
        return Copied(self._entries, self._size, dict(self._skipped))

    def entry(self, source_dir: int, name: str, target_dir: int, target_name: str) -> None:
        """Copy one file that is not a directory, as a copy-up does.

        Raises:
            OSError: it cannot be read or written.
        """
        status = os.stat(name, dir_fd=source_dir, follow_symlinks=False)
        self._file(source_dir, name, target_dir, target_name, status, name)

    def attributes(self, source: int, target: int) -> None:
        """Give one open file or directory the attributes of another."""
        self._attributes(source, target, os.fstat(source))

    @property
    def skipped(self) -> dict[str, int]:
        """What could not be kept so far, by kind."""
        return dict(self._skipped)

    def _entry(self, source_dir: int, target_dir: int, name: str, path: str) -> tuple[int, int] | None:
        """Copy one entry; a directory is made, and its two descriptors are returned to copy its contents."""
        try:
            status = os.stat(name, dir_fd=source_dir, follow_symlinks=False)
        except FileNotFoundError:
            if self._allow_changes:
                return None
            raise
        if self._left_out(name, path, status):
            return None
        self._entries += 1
        if self._progress is not None:
            self._progress(self._entries, self._size)
        if self._merge:
            self._make_way(target_dir, name, status)
        if not stat.S_ISDIR(status.st_mode):
            self._file(source_dir, name, target_dir, name, status, path)
            return None
        return self._directory(source_dir, target_dir, name)

    def _left_out(self, name: str, path: str, status: os.stat_result) -> bool:
        if self._avoid and (status.st_dev, status.st_ino) in self._avoid:
            return True
        return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(name, p) for p in self._exclude)

    def _make_way(self, target_dir: int, name: str, status: os.stat_result) -> None:
        try:
            there = os.stat(name, dir_fd=target_dir, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not (stat.S_ISDIR(there.st_mode) and stat.S_ISDIR(status.st_mode)):
            remove(target_dir, name)

    def _directory(self, source_dir: int, target_dir: int, name: str) -> tuple[int, int] | None:
        merged = False
        try:
            os.mkdir(name, 0o700, dir_fd=target_dir)
        except FileExistsError:
            if not self._merge:
                raise
            merged = True
        try:
            source = open_on_mount(source_dir, name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                self._skipped["mountpoint"] += 1
                return None
            raise OSError(error.errno, error.strerror, path_of(source_dir, name)) from error
        try:
            target = os.open(name, OPEN_DIRECTORY, dir_fd=target_dir)
        except OSError:
            os.close(source)
            raise
        try:
            if merged:
                drop_acls(target)
        except OSError:
            os.close(source)
            os.close(target)
            raise
        return source, target

    def _file(
        self, source_dir: int, name: str, target_dir: int, target_name: str, status: os.stat_result, path: str
    ) -> None:
        mode = status.st_mode
        if self._hard_links:
            try:
                os.link(name, target_name, src_dir_fd=source_dir, dst_dir_fd=target_dir, follow_symlinks=False)
            except OSError as error:
                # The filesystem's limit of names per file is reached (ext4: 65,000); a copy starts a new file.
                if error.errno != errno.EMLINK:
                    raise
            else:
                return
        if stat.S_ISSOCK(mode):
            self._skipped["socket"] += 1
            return
        if status.st_nlink > 1 and self._link(status, target_dir, target_name, path):
            return
        if stat.S_ISREG(mode):
            self._regular(source_dir, name, target_dir, target_name, status, path)
            return
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(name, dir_fd=source_dir), target_name, dir_fd=target_dir)
        elif not self._node(target_dir, target_name, status):
            return
        self._attributes_at(source_dir, name, target_dir, target_name, status)

    def _link(self, status: os.stat_result, target_dir: int, target_name: str, path: str) -> bool:
        if self._top < 0:
            return False
        identity = (status.st_dev, status.st_ino)
        first = self._linked.setdefault(identity, path)
        if first == path:
            return False
        try:
            self._link_to(first, target_dir, target_name)
        except OSError as error:
            # EMLINK: the filesystem's limit of names; ENOENT: it was skipped. This name starts a new file.
            if error.errno not in (errno.EMLINK, errno.ENOENT):
                raise
            self._linked[identity] = path
            return False
        return True

    def _link_to(self, first: str, target_dir: int, target_name: str) -> None:
        try:
            os.link(first, target_name, src_dir_fd=self._top, dst_dir_fd=target_dir, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
        else:
            return
        above, _, name = first.rpartition("/")  # the path is longer than the kernel takes at once
        directory = files.open_beneath(above, OPEN_DIRECTORY, dir_fd=self._top, resolve=0)
        try:
            os.link(name, target_name, src_dir_fd=directory, dst_dir_fd=target_dir, follow_symlinks=False)
        finally:
            os.close(directory)

    def _node(self, target_dir: int, name: str, status: os.stat_result) -> bool:
        try:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target_dir)
        except PermissionError:
            self._skipped["device"] += 1
            return False
        return True

    def _regular(
        self, source_dir: int, name: str, target_dir: int, target_name: str, status: os.stat_result, path: str
    ) -> None:
        source = os.open(name, _READ, dir_fd=source_dir)
        try:
            before = os.fstat(source)
            if not os.path.samestat(before, status) and not self._allow_changes:
                raise _changed(path)
            target = os.open(target_name, NEW_FILE, 0o600, dir_fd=target_dir)
            try:
                self._size += self.content(source, target, before)
                self._attributes(source, target, before)
            finally:
                os.close(target)
            now = os.fstat(source)
            if not self._allow_changes and _version(now) != _version(before):
                raise _changed(path)
        finally:
            os.close(source)

    def content(self, source: int, target: int, status: os.stat_result) -> int:
        """Copy the content of an open file into an empty one, with its holes; return how many bytes."""
        if status.st_size == 0:
            return 0
        if self._clone:
            try:
                files.clone_file(source, target)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                self._clone = False
            else:
                return status.st_size
        _await_write(source)
        if has_holes(status):
            ranges = list(data_ranges(source, status.st_size))
            if ranges != [(0, status.st_size)]:
                done = sum(copy_range(source, target, start, end) for start, end in ranges)
                os.ftruncate(target, status.st_size)
                return done
        return copy_range(source, target, 0, None)

    def _attributes(self, source: int, target: int, status: os.stat_result) -> None:
        """Give an open file or directory the attributes of another; the times last, since the rest changes them."""
        # First, since chown removes security.capability and the set-user-ID bits.
        owned = self._chown(status, lambda: os.chown(target, status.st_uid, status.st_gid))
        # Before chmod, which may remove our own permission to set them.
        self._xattrs(source, target)
        if not owned:
            os.setxattr(target, OVERRIDE_XATTR, format_override(status.st_uid, status.st_gid, status.st_mode))
        os.chmod(target, stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _attributes_at(
        self, source_dir: int, name: str, target_dir: int, target_name: str, status: os.stat_result
    ) -> None:
        """The same for a file that cannot be opened: a symlink, a device, a FIFO."""
        self._chown(
            status,
            lambda: os.chown(target_name, status.st_uid, status.st_gid, dir_fd=target_dir, follow_symlinks=False),
        )
        self._xattrs(path_of(source_dir, name), path_of(target_dir, target_name))
        if not stat.S_ISLNK(status.st_mode):
            # Before Linux 6.6, fchmodat(2) always follows symlinks; this file was just made and is not one.
            os.chmod(target_name, stat.S_IMODE(status.st_mode), dir_fd=target_dir)
        os.utime(
            target_name,
            ns=(status.st_atime_ns, status.st_mtime_ns),
            dir_fd=target_dir,
            follow_symlinks=False,
        )

    def _chown(self, status: os.stat_result, change: Callable[[], None]) -> bool:
        if self._set_owner:
            try:
                change()
            except OSError as error:
                # EPERM: not ours to give away; EINVAL: outside the map of a user namespace.
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
                self._set_owner = False
            else:
                return True
        same = status.st_uid == os.geteuid() and status.st_gid == os.getegid()
        if not same:
            self._skipped["owner"] += 1
        return same

    def _xattrs(self, source: str | int, target: str | int) -> None:
        follow = isinstance(source, int)
        for name in list_xattrs(source):
            if name in self._leave_out or (not self._keep_markers and is_marker(name)):
                continue
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno == errno.ENODATA:
                    continue
                if error.errno not in _NO_XATTR:
                    raise
                self._skipped["xattr"] += 1


def copy_tree(source: str, target: str, copier: Copier, *, follow: bool = False) -> Copied:
    """Copy one directory into another, see :meth:`Copier.tree`.

    Args:
        source: the directory to copy.
        target: the directory to copy into.
        copier: does it.
        follow: whether ``source`` may be a symlink.

    Raises:
        FailedPrecondition, OSError: see :meth:`Copier.tree`.
    """
    with opened(source, OPEN_DIRECTORY & ~os.O_NOFOLLOW if follow else OPEN_DIRECTORY) as one, opened(target) as other:
        return copier.tree(one, other)


def copy_attributes(source: str, target: str) -> None:
    """Give one directory the owner, mode, xattrs and times of another, but not OverlayFS's markers.

    Raises:
        OSError: something cannot be read or set.
    """
    with opened(source) as one, opened(target) as other:
        Copier().attributes(one, other)


def _await_write(fd: int) -> None:
    """Wait for the end of a write(2) that is under way.

    It sets the file's times before it changes the content (mm/filemap.c, __generic_file_write_iter), so that a reader
    which met half of it would see no later times either. Ext4, btrfs and tmpfs read without the inode's lock; their
    SEEK_DATA takes it. Xfs reads with it.
    """
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EINVAL):  # it has no data, or the filesystem has no such call
            raise


def has_holes(status: os.stat_result) -> bool:
    """Whether a regular file may have holes; :func:`data_ranges` tells for sure."""
    # Xfs allocates ahead of a file's end, and fallocate(2) behind it, so a file with holes may have as many blocks as
    # bytes. For small files, asking costs more than writing the holes.
    return status.st_blocks * 512 < status.st_size or status.st_size >= _MAY_HAVE_HOLES


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data, as ``(start, end)`` (lseek(2), SEEK_DATA and SEEK_HOLE)."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, position


def copy_range(source: int, target: int, start: int, end: int | None) -> int:
    """Copy bytes to the same offset of another file, up to ``end`` or the end of the file; return how many."""
    position = start
    while end is None or position < end:
        length = _RANGE if end is None else min(_RANGE, end - position)
        try:
            copied = os.copy_file_range(source, target, length, position, position)
        except OSError as error:
            # EXDEV before Linux 5.19, EINVAL and EOPNOTSUPP on filesystems without support.
            if error.errno not in (*_NO_CLONE, errno.EIO, errno.EBADF):
                raise
            return position - start + _copy_by_hand(source, target, position, end)
        if copied == 0:
            # Linux 5.3 to 5.18 return 0 for files of /proc and /sys, whose size is 0 although they have content.
            return position - start + _copy_by_hand(source, target, position, end)
        position += copied
    return position - start


def _copy_by_hand(source: int, target: int, start: int, end: int | None) -> int:
    position = start
    while end is None or position < end:
        length = _CHUNK if end is None else min(_CHUNK, end - position)
        data = os.pread(source, length, position)
        if not data:
            break
        view = memoryview(data)
        while view:
            view = view[os.pwrite(target, view, position + len(data) - len(view)) :]
        position += len(data)
    return position - start


def _names(fd: int) -> Iterator[str]:
    names = [entry.name for entry in files.list_directory(fd)]
    names.sort(key=os.fsencode)
    return iter(names)


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"{shown(path)} changed while it was read",
        key=path,
        hint="import it when it is quiet, or allow changes",
    )
