"""The work trees of git in a capture: their indexes are refreshed for the copies, so that git need not read these.

No git is run, and no configuration is read. A work tree is what lies beside a directory ``.git`` with an ``index``. One
whose index or files lie elsewhere has other stats in its index than those that are found here, and stays as it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import MergedDirectory, Stack
from onlap.syscalls import files
from onlap.trees.walk import opened
from onlap.workspaces.capture.fingerprint import NOTHING, Directories, numbers
from onlap.workspaces.capture.git_index import Copy, Stats, refreshed

_DIRECTORY, _INDEX = ".git", "index"
# Bytes; the index of a million files has a tenth of this.
_LARGEST = 1 << 30


def refresh_indexes(layers: list[str], markers: Markers, known: Directories) -> None:
    """Refresh the indexes that the topmost layer has.

    Args:
        layers: of the capture, topmost first; the topmost is still written to.
        markers: of all of them.
        known: what the captured directory holds.

    Raises:
        OSError: an index cannot be written.
    """
    for path in _work_trees(known):
        where = f"{path}/{_DIRECTORY}" if path else _DIRECTORY
        try:
            fd = _open(layers[0], f"{where}/{_INDEX}")
        except OSError:
            continue  # it is not in this layer, or not ours to write to
        try:
            with Stack(layers, markers) as stack:
                _refresh(fd, _Finder(path, known, stack))
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
        stack: the layers of the capture.
    """

    def __init__(self, top: str, known: Directories, stack: Stack) -> None:
        self._prefix = f"{top}/" if top else ""
        self._known = known
        # The directories on the way to the last file, since an index is sorted: names, and both sides.
        self._names: list[str] = []
        self._rows: list[dict[str, bytes]] = [dict(known.get(top, NOTHING).each())]
        here: MergedDirectory | None = stack.top()
        for name in top.split("/") if top else ():
            here = here.open(name) if here is not None else None
        self._directories: list[MergedDirectory | None] = [here]

    def look(self, path: bytes) -> tuple[Stats, Callable[[], Copy | None]] | None:
        """See :data:`onlap.workspaces.capture.git_index.Look`."""
        *above, name = os.fsdecode(path).split("/")
        self._go(above)
        row = self._rows[-1].get(name)
        if row is None:
            return None
        return Stats(*numbers(row)), lambda: self._copy(name)

    def _go(self, names: list[str]) -> None:
        if names == self._names:
            return
        shared = 0
        while shared < min(len(names), len(self._names)) and names[shared] == self._names[shared]:
            shared += 1
        while len(self._names) > shared:
            self._names.pop()
            self._rows.pop()
            gone = self._directories.pop()
            if gone is not None:
                gone.close()
        for name in names[shared:]:
            self._names.append(name)
            path = self._prefix + "/".join(self._names)
            self._rows.append(dict(self._known.get(path, NOTHING).each()))
            here = self._directories[-1]
            self._directories.append(here.open(name) if here is not None else None)

    def _copy(self, name: str) -> Copy | None:
        here = self._directories[-1]
        found = here.lookup(name) if here is not None else None
        if found is None:
            return None
        status = found.status
        return Copy(status.st_ino, status.st_ctime_ns, status.st_uid, status.st_gid)
