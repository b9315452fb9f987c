"""Layers whose archive was made by comparing two whole trees, and not of the layer's tree.

Docker's ``naiveDiff`` makes the archive of what BuildKit has built where it cannot take the tree as it is: in a user
namespace, where the kernel renames directories (``redirect_dir``), and where the layer stands on a copy (see
:mod:`onlap.check.stores.docker.copies`). Against the tree, such an archive

- lacks what looks as it does below: a file of the same size and time, a directory of the same mode and owner;
- has a whiteout for each name that an opaque directory hides, and no mark.

Source: moby v26.1.5, daemon/graphdriver/overlay2/overlay.go (Diff), pkg/archive/changes.go (addChanges) and
changes_unix.go (statDifferent).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterable

from onlap.check.stores.comparing.archive import Uncomparable
from onlap.check.stores.comparing.below import Below
from onlap.check.stores.comparing.judgement import CAPABILITY
from onlap.check.stores.contract import StoreLayer
from onlap.layers import paths
from onlap.overlayfs.markers import OPAQUE_YES, get_xattr, is_whiteout
from onlap.syscalls.files import RESOLVE_NO_XDEV, list_directory, open_beneath
from onlap.trees.manifest import Deviation
from onlap.trees.walk import OPEN_DIRECTORY, path_of

_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SECOND = 10**9


class Naive:
    """What of a tree such an archive does not tell.

    Args:
        layer: the layer.
        top: a descriptor of the tree.
        below: the layers below.
    """

    def __init__(self, layer: StoreLayer, top: int, below: Below) -> None:
        self._layer = layer
        self._top = top
        self._below = below
        self._marked: dict[str, bool] = {}

    def looks_as_below(self, path: str) -> bool:
        """Whether what is in the tree was left out, since it looks as it does below.

        Raises:
            OSError: it cannot be looked at.
        """
        pending = [path]
        while pending:
            path = pending.pop()
            status = self._status(path)
            if is_whiteout(status):
                if self._below.has(path):
                    return False
                continue
            below = self._below.status(path)
            if below is None or not self._is_same(path, status, below):
                return False
            if stat.S_ISDIR(status.st_mode):
                names = self._names(path)
                if self.is_opaque(path) and not names >= self._below.names(path):
                    return False  # it hides something
                pending += [paths.join(path, name) for name in names]
        return True

    def hides_what_it_says(self, path: str, whiteouts: Collection[str]) -> bool:
        """Whether each name that an opaque directory hides has a whiteout in the archive, or is made again.

        Raises:
            OSError: it cannot be looked at.
        """
        hidden = self._below.names(path) - self._names(path)
        return all(paths.join(path, name) in whiteouts for name in hidden)

    def is_below_opaque(self, path: str) -> bool:
        """Whether a directory above a path hides what is below it.

        Raises:
            OSError: it cannot be looked at.
        """
        while path:
            path = path.rpartition("/")[0]
            if path and self.is_opaque(path):
                return True
        return False

    def is_opaque(self, path: str) -> bool:
        """Whether the tree has an opaque directory of that path.

        Raises:
            OSError: it cannot be looked at.
        """
        return self._xattr(path, self._layer.markers.opaque) == OPAQUE_YES

    def check_marked(self, deviations: Iterable[Deviation]) -> None:
        """Raise Uncomparable if what deviates is shown from elsewhere: a renamed directory, data of a layer below."""
        if any(self._is_marked(each.path) for each in deviations if not each.found or "content" in each.what):
            raise Uncomparable("the kernel renamed directories in it, or left data below (redirect_dir, metacopy)")

    def _is_marked(self, path: str) -> bool:
        # What cannot be read is told of already.
        markers = self._layer.markers
        above: list[str] = []
        while path and path not in self._marked:
            above.append(path)
            path = path.rpartition("/")[0]
        found = self._marked.get(path, False)
        for each in reversed(above):
            with contextlib.suppress(OSError):
                found = found or any(
                    self._xattr(each, name) is not None for name in (markers.redirect, markers.metacopy)
                )
            self._marked[each] = found
        return found

    def _is_same(self, path: str, found: os.stat_result, below: os.stat_result) -> bool:
        if (found.st_mode, found.st_uid, found.st_gid) != (below.st_mode, below.st_uid, below.st_gid):
            return False
        if found.st_mode & stat.S_IFDIR:  # statDifferent's test, which block devices pass, too
            return self._xattr(path, CAPABILITY) == self._below.xattr(path, CAPABILITY)
        if (found.st_rdev, found.st_size) != (below.st_rdev, below.st_size):
            return False
        one, other = found.st_mtime_ns, below.st_mtime_ns
        is_same_time = one == other or (one // _SECOND == other // _SECOND and 0 in (one % _SECOND, other % _SECOND))
        return is_same_time and self._xattr(path, CAPABILITY) == self._below.xattr(path, CAPABILITY)

    def _open_parent(self, path: str) -> tuple[int, str]:
        above, _, base = path.rpartition("/")
        return open_beneath(above or ".", _PASS, dir_fd=self._top, resolve=RESOLVE_NO_XDEV), base

    def _status(self, path: str) -> os.stat_result:
        parent, base = self._open_parent(path)
        try:
            return os.stat(base, dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)

    def _xattr(self, path: str, name: str) -> bytes | None:
        """The value of an xattr; None also if there is no such file."""
        try:
            parent, base = self._open_parent(path)
            try:
                return get_xattr(path_of(parent, base), name)
            finally:
                os.close(parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None

    def _names(self, path: str) -> set[str]:
        fd = open_beneath(path or ".", OPEN_DIRECTORY, dir_fd=self._top, resolve=RESOLVE_NO_XDEV)
        try:
            return {entry.name for entry in list_directory(fd)}
        finally:
            os.close(fd)
