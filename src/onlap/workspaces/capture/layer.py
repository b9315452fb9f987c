"""The tree that a capture writes: a layer on the earlier capture, in step with a walk of the source.

Nothing is made before something differs. A directory of the layer is always merged with the one below and never opaque,
so that what lies below is what the earlier capture held, and each of its names that is gone gets a whiteout.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from onlap.overlayfs.markers import is_marker, make_whiteout
from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.meta import list_xattrs
from onlap.trees.remove import remove
from onlap.trees.walk import OPEN_DIRECTORY, Descent

_NOT_OURS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENODATA)


class Layer:
    """The tree, and where in it the walk is.

    Args:
        begin: called with the first change; gives a descriptor of the tree's top, which stays open.
        copier: copies the files.
        whiteouts: whether what is removed needs a whiteout; otherwise the tree holds all of the earlier capture.

    Attributes:
        entries: how many files were written, and directories made or changed.
    """

    def __init__(self, begin: Callable[[], int], copier: Copier, *, whiteouts: bool) -> None:
        self._begin = begin
        self._copier = copier
        self._whiteouts = whiteouts
        self._top = -1
        self._names: list[str] = []
        self._descent: Descent | None = None
        # For each open directory, whether it was empty when it was opened, in this pass.
        self._fresh: list[bool] = []
        self.entries = 0

    @property
    def begun(self) -> bool:
        """Whether there is a tree."""
        return self._top >= 0

    def begin(self) -> None:
        """Make the tree, if there is none yet."""
        if self._top < 0:
            self._top = self._begin()

    def enter(self, name: str) -> None:
        """Follow the walk into a directory."""
        self._names.append(name)

    def leave(self, source: int | None) -> None:
        """Follow the walk out of a directory; give it the attributes of the source's if it is open.

        Args:
            source: the directory of the source; None for one that is only a mount point.

        Raises:
            OSError: an attribute cannot be set.
        """
        descent = self._descent
        if descent is not None and len(self._fresh) == len(self._names) + 1:
            # Last, since everything that is made in it changes its times.
            if source is not None:
                self._copier.attributes(source, descent.fd)
            self._fresh.pop()
            if self._names:
                descent.leave()
            else:
                self.stop()
        if self._names:
            self._names.pop()

    def stop(self) -> None:
        """End a walk, also one that failed."""
        descent, self._descent = self._descent, None
        self._names.clear()
        self._fresh.clear()
        if descent is not None:
            descent.close()

    def directory(self) -> int:
        """The directory where the walk is, made in the layer with those above it; raises OSError."""
        if self._descent is None:
            self.begin()
            self._descent = Descent(self._top)
            _strip(self._top)
            self._fresh.append(False)
        while len(self._fresh) <= len(self._names):
            self.entries += 1
            fd, fresh = _into(self._descent.fd, self._names[len(self._fresh) - 1], fresh=self._fresh[-1])
            self._descent.enter(fd)
            self._fresh.append(fresh)
        return self._descent.fd

    def put(self, source: int, name: str, mode: int) -> bool:
        """Copy a file that is not a directory to where the walk is; false if that takes privilege, as for devices.

        Args:
            source: the directory that holds it.
            name: its name.
            mode: its type.

        Raises:
            OSError: it cannot be read or written.
        """
        target = self.directory()
        self._make_way(target, name)
        self.entries += 1
        self._copier.entry(source, name, target, name)
        return not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) or _exists(target, name)

    def link(self, first: str, name: str) -> bool:
        """Make ``name``, where the walk is, another name of a file of the layer; false if that is impossible.

        Args:
            first: the path of the file from the top.
            name: the new name.

        Raises:
            OSError: it cannot be made.
        """
        target = self.directory()
        self._make_way(target, name)
        above, _, last = first.rpartition("/")
        with contextlib.ExitStack() as stack:
            directory = self._top
            try:
                if above:
                    directory = files.open_beneath(above, OPEN_DIRECTORY, dir_fd=self._top, resolve=0)
                    stack.callback(os.close, directory)
                os.link(last, name, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=False)
            except OSError as error:
                # The filesystem's limit of names per file; or it is gone, or cannot be reached by its owner.
                if error.errno in (errno.EMLINK, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
                    return False
                raise
        self.entries += 1
        return True

    def hide(self, name: str, *, below: bool) -> None:
        """Remove a name where the walk is.

        Args:
            name: the name.
            below: whether the earlier capture has it.

        Raises:
            OSError: it cannot be removed.
        """
        target = self.directory()
        self._make_way(target, name)
        if below and self._whiteouts:
            self.entries += 1
            make_whiteout(name, dir_fd=target)

    def _make_way(self, target: int, name: str) -> None:
        if not self._fresh[-1]:
            remove(target, name)


def _exists(dir_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _into(dir_fd: int, name: str, *, fresh: bool) -> tuple[int, bool]:
    """Open a directory of the layer, making it if there is none; returns whether it is new."""
    if not fresh:
        try:
            fd = _open_own(dir_fd, name)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            os.unlink(name, dir_fd=dir_fd)  # a file or a whiteout
        else:
            try:
                _strip(fd)
            except BaseException:
                os.close(fd)
                raise
            return fd, False
    os.mkdir(name, 0o700, dir_fd=dir_fd)
    return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd), True


def _open_own(dir_fd: int, name: str) -> int:
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    except PermissionError:
        # An earlier pass gave it a mode that keeps its owner out. It is in a root that no other user can reach.
        if not stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            raise
        os.chmod(name, 0o700, dir_fd=dir_fd)
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)


def _strip(fd: int) -> None:
    """Take a directory's attributes away, to be given anew: its files would inherit ACLs, and some may be gone."""
    for name in list_xattrs(fd):
        if is_marker(name):
            continue
        try:
            os.removexattr(fd, name)
        except OSError as error:
            if error.errno not in _NOT_OURS:  # those of a security module stay
                raise
    if os.geteuid() != 0:
        os.fchmod(fd, 0o700)
