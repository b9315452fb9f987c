"""The work trees of git in a capture: their indexes are refreshed for the copies, so that git need not read these.

No git is run, and no configuration is read. A work tree is what lies beside a directory ``.git`` with an ``index``. One
whose index or files lie elsewhere has other stats in its index than those that are found here, and stays as it is.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing

from onlap.layers.apply.lowers import Lowers
from onlap.layers.paths import join
from onlap.overlayfs.markers import Markers
from onlap.syscalls import files
from onlap.trees.walk import opened
from onlap.workspaces.capture.fingerprint import NOTHING, Directories, numbers
from onlap.workspaces.capture.git_index import Copy, Stats, refreshed

_DIRECTORY, _INDEX = ".git", "index"
# Bytes; the index of a million files has a tenth of this.
_LARGEST = 1 << 30
# How many directories of the original are kept as dictionaries.
_KEPT = 64


def refresh_indexes(layers: list[str], markers: Markers, known: Directories) -> None:
    """Refresh the indexes that the topmost layer has.

    Args:
        layers: of the capture, topmost first; the topmost is still written to.
        markers: of all of them.
        known: what the captured directory holds.

    Raises:
        OSError: an index cannot be written.
    """
    with closing(Lowers(layers, markers)) as copies:
        for path in _work_trees(known):
            try:
                fd = _open(layers[0], join(join(path, _DIRECTORY), _INDEX))
            except OSError:
                continue  # it is not in this layer, or not ours to write to
            try:
                _refresh(fd, _Finder(path, known, copies))
            finally:
                os.close(fd)


def _work_trees(known: Directories) -> Iterator[str]:
    for path in known:
        above, _, name = path.rpartition("/")
        if name == _DIRECTORY and _INDEX in known[path].split():
            yield above


def _open(layer: str, path: str) -> int:
    with opened(layer) as top:
        return files.open_beneath(path, os.O_RDWR | os.O_NONBLOCK, dir_fd=top, resolve=0)


def _refresh(fd: int, finder: _Finder) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _LARGEST:
        return
    with open(fd, "rb", buffering=0, closefd=False) as file:
        new = refreshed(file.read(), status.st_mtime_ns, finder.look)
    if new is None:
        return
    os.lseek(fd, 0, os.SEEK_SET)
    files.write_all(fd, new)
    # Git tells by it which files are too young to be known by their stats.
    os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


class _Finder:
    """Finds the files of a work tree: what the original looked like, and the copies.

    Args:
        top: the path of the work tree.
        known: what the captured directory holds.
        copies: the layers of the capture.
    """

    def __init__(self, top: str, known: Directories, copies: Lowers) -> None:
        self._prefix = f"{top}/" if top else ""
        self._copies = copies
        # An index is sorted: the files of a directory follow each other, but for those in directories below it.
        self._rows = functools.lru_cache(_KEPT)(lambda path: dict(known.get(path, NOTHING).each()))

    def look(self, path: bytes) -> tuple[Stats, Callable[[], Copy | None]] | None:
        """See :data:`onlap.workspaces.capture.git_index.Look`."""
        above, _, name = (self._prefix + os.fsdecode(path)).rpartition("/")
        row = self._rows(above).get(name)
        if row is None:
            return None
        return Stats(*numbers(row)), lambda: self._copy(above, name)

    def _copy(self, above: str, name: str) -> Copy | None:
        found = self._copies.lookup(above, name)
        if found is None:
            return None
        status = found.status
        return Copy(status.st_ino, status.st_ctime_ns, status.st_uid, status.st_gid)
