"""The removals in an archive: whiteouts and opaque markers.

They act on what was there before the archive, wherever they are among its entries (OCI image specification, layer.md):
on the layers below, and on the layer's earlier contents. The archive's own files stay.

Unlike entries, they follow no symlinks, since comparing two trees follows none. If ``lib`` was a symlink to ``usr/lib``
and is a directory now, Docker's overlay2 writes ``lib/`` and ``lib/.wh..wh..opq``, and neither Docker nor containerd
removes anything from ``usr/lib`` for that.
"""

from __future__ import annotations

import os
import stat

from onlap.errors import shown
from onlap.layers import paths
from onlap.layers.apply.directories import Blocked, Directory
from onlap.layers.apply.upper import Upper
from onlap.overlayfs.markers import is_whiteout, make_whiteout
from onlap.syscalls import files


class Whiteouts:
    """The removals of one archive.

    Args:
        upper: the layer being written.
    """

    def __init__(self, upper: Upper) -> None:
        self._upper = upper
        self._directories = upper.directories
        self._lowers = upper.lowers
        # What was there before the archive is removed: at these paths, and in these directories.
        self._removed = paths.PathSet()
        self._emptied = paths.PathSet()

    def whiteout(self, parent: str, base: str) -> None:
        """Remove what was at ``base`` in ``parent`` before the archive.

        Raises:
            ValueError: the symlink to be removed is on the path of an entry.
            OSError: it cannot be removed.
        """
        where = self._before(parent)
        if where is not None:
            self._remove_before(where, base)

    def opaque(self, path: str) -> None:
        """Remove everything that was in the directory ``path`` before the archive.

        Raises:
            ValueError: a symlink to be removed is on the path of an entry.
            OSError: it cannot be removed.
        """
        where = self._before(path)
        if where is None or self._is_empty(where):
            return
        if not where:
            self._clear_top()
            self._emptied.add(where)
            return
        upper = self._directories.find(where)
        if isinstance(upper, Blocked):
            return
        self._check_followed(where)
        self._emptied.add(where)
        if upper is not None:
            self._prune(where)
        if self._lowers.directory(where) is not None:
            directory = self._upper.ensure(where)
            directory.dirty = True
            self._upper.make_opaque(directory)

    def _clear_top(self) -> None:
        # fs/overlayfs/super.c merges the tops of all layers and ignores their xattrs, so each name needs a whiteout.
        below = self._lowers.directory("")
        names = set(below.names()) if below is not None else set()
        if self._upper.tracking:
            names.update(entry.name for entry in files.list_directory(self._upper.top.fd))
        for name in sorted(names):
            self._remove_before("", name)

    def _is_empty(self, path: str) -> bool:
        """Whether everything that was in the directory ``path`` before the archive is already removed."""
        return self._emptied.covers(path) or self._removed.covers(path)

    def _before(self, path: str) -> str | None:
        """The path of the directory ``path`` before the archive; None if there was none, or it is hidden."""
        if self._lowers.directory(path) is not None and not isinstance(self._directories.find(path), Blocked):
            return path  # the usual case: all names on the path are, and were, directories
        here = ""
        for name in path.split("/") if path else ():
            if not self._was_directory(here, name):
                return None
            here = paths.join(here, name)
        return here

    def _was_directory(self, here: str, name: str) -> bool:
        upper = self._directories.find(here)
        status = upper.status(name) if isinstance(upper, Directory) else None
        if status is not None:
            if is_whiteout(status):
                return False  # an earlier whiteout removed it
            if self._upper.tracking and stat.S_ISDIR(status.st_mode):
                return True
            if self._upper.tracking and not self._upper.is_made(paths.join(here, name)):
                return False
        found = self._lowers.lookup(here, name)
        return found is not None and stat.S_ISDIR(found.status.st_mode)

    def _remove_before(self, where: str, base: str) -> None:
        """Remove what was at a path without symlinks, and hide the layers below; the archive's own entries stay."""
        path = paths.join(where, base)
        if self._is_empty(where) or path in self._removed:
            return
        upper = self._directories.find(where)
        if isinstance(upper, Blocked):
            return  # already hidden by a whiteout or a file of the archive
        self._check_followed(path)
        self._removed.add(path)
        if upper is not None:
            status = upper.status(base)
            if status is not None and (is_whiteout(status) or self._kept(upper, base, path, status)):
                return
        if self._lowers.lookup(where, base) is not None:
            directory = self._upper.ensure(where)
            directory.dirty = True
            make_whiteout(base, dir_fd=directory.fd)

    def _kept(self, upper: Directory, base: str, path: str, status: os.stat_result) -> bool:
        """Remove what the archive did not make at ``path`` and below; return whether anything is left."""
        if not stat.S_ISDIR(status.st_mode):
            if self._upper.is_made(path):
                return True
            upper.dirty = True
            os.unlink(base, dir_fd=upper.fd)
            self._upper.forget(path)
            return False
        kept = self._prune(path) or self._upper.is_made(path)
        directory = self._directories.find(path)
        if not isinstance(directory, Directory):
            return False
        if kept:
            if not self._upper.is_made(path):
                self._upper.attributes.reset_directory(directory)
            self._upper.make_opaque(directory)
            return True
        self._rmdir(path)
        return False

    def _rmdir(self, path: str) -> None:
        parent_path, _, base = path.rpartition("/")
        self._directories.close_below(path, forget=True)
        parent = self._directories.find(parent_path)
        if isinstance(parent, Directory):
            parent.dirty = True
            os.rmdir(base, dir_fd=parent.fd)
        self._upper.forget(path)

    def _prune(self, top: str) -> bool:
        """Remove from a directory of the layer what the archive did not make; return whether anything is left in it.

        Remaining directories that the archive does not describe lose their attributes from the layers below.
        """
        # The directories that are not empty afterwards.
        left: set[str] = set()
        # One frame per directory: its path, and the directories in it that are still to be visited.
        frames = [(top, self._prune_files(top, left))]
        while frames:
            path, below = frames[-1]
            if below:
                child = below.pop()
                frames.append((child, [] if self._is_pruned(child, left) else self._prune_files(child, left)))
                continue
            frames.pop()
            if path == top:
                break
            self._directories.keep_above(path)
            if path in left or self._upper.is_made(path):
                left.add(frames[-1][0])
                directory = self._directories.find(path)
                if not self._upper.is_made(path) and isinstance(directory, Directory):
                    self._upper.attributes.reset_directory(directory)
                left.discard(path)
            else:
                self._rmdir(path)
        return top in left

    def _is_pruned(self, path: str, left: set[str]) -> bool:
        """Whether an earlier removal left only the archive's own entries in a directory."""
        if path not in self._emptied and path not in self._removed:
            return False
        directory = self._directories.find(path)
        if isinstance(directory, Directory) and files.list_directory(directory.fd):
            left.add(path)
        return True

    def _prune_files(self, path: str, left: set[str]) -> list[str]:
        """Remove files from a directory; return the paths of the directories in it."""
        directory = self._directories.find(path)
        if not isinstance(directory, Directory):
            return []
        below = []
        for entry in files.list_directory(directory.fd):
            child = paths.join(path, entry.name)
            if entry.is_dir(follow_symlinks=False):
                below.append(child)
                continue
            made = self._upper.is_made(child)
            if made and not entry.is_file(follow_symlinks=False) and not entry.is_symlink():
                made = not is_whiteout(entry.stat(follow_symlinks=False))
            if made:
                left.add(path)
            else:
                directory.dirty = True
                os.unlink(entry.name, dir_fd=directory.fd)
                self._upper.forget(child)
        return below

    def _check_followed(self, path: str) -> None:
        followed = self._upper.followed.first_below(path)
        if followed is not None:
            raise ValueError(
                f"it removes the symlink {shown(followed)}, which is on the path of earlier entries; "
                "such an archive must have its whiteouts first"
            )
