"""Removed trees: moved away in one rename, deleted later, and never while somebody still reads or mounts them."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from onlap.catalog.locks import open_directory, try_lock
from onlap.mounts import mountinfo
from onlap.overlayfs.options import layer_paths
from onlap.trees.remove import remove

# rename(2) onto a directory that is not empty.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class Swept(NamedTuple):
    """What a pass over the trash did.

    Attributes:
        removed: trees deleted.
        waiting: trees that are still mounted or read by somebody; a later pass takes them.
    """

    removed: int
    waiting: int


class Trash:
    """ROOT/trash.

    Args:
        root: ROOT, as an absolute path.
        directory: ROOT/trash.
    """

    def __init__(self, root: str, directory: str) -> None:
        self._root = root
        self._directory = directory

    def put(self, directory: str) -> None:
        """Move a snapshot's directory away; nothing happens when it is not there.

        Raises:
            OSError: it cannot be moved.
        """
        name = os.path.basename(directory)
        for attempt in range(1000):
            target = f"{self._directory}/{name}" + (f".{attempt}" if attempt else "")
            try:
                os.rename(directory, target)
            except FileNotFoundError:
                return
            except OSError as error:
                # An unfinished tree of the same number waits there already.
                if error.errno not in _TAKEN:
                    raise
            else:
                return
        raise OSError(errno.EEXIST, "a thousand trees of one number wait in the trash", directory)

    def names(self) -> list[str]:
        """What waits."""
        return os.listdir(self._directory)

    def sweep(self, *, stop: Callable[[], bool] = lambda: False, rate: float | None = None) -> Swept:
        """Delete what nobody uses.

        Args:
            stop: asked between files; when it says yes, the rest is left for later.
            rate: files a second, None for no limit.

        Raises:
            OSError: a tree cannot be deleted, for another reason than that it is in use.
        """
        names = self.names()
        if not names:
            return Swept(0, 0)
        used = self._in_use()
        pace = _Pace(stop, rate)
        removed = waiting = 0
        top = open_directory(self._directory)
        try:
            for name in names:
                if stop():
                    break
                if name.partition(".")[0] in used or not self._delete(top, name, pace):
                    waiting += 1
                else:
                    removed += 1
        except _Stopped:
            waiting = len(names) - removed
        finally:
            os.close(top)
        return Swept(removed, waiting)

    def _delete(self, top: int, name: str, pace: _Pace) -> bool:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        except FileNotFoundError:
            return True  # another process was faster
        try:
            # Readers hold it shared, by the open directory itself, so that the rename changed nothing for them.
            if not try_lock(fd):
                return False
            try:
                remove(top, name, pace=pace)
            except OSError as error:
                # EXDEV, EBUSY: mounted since we looked.
                if error.errno in (errno.EXDEV, errno.EBUSY):
                    return False
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise
                return False
            return True
        finally:
            os.close(fd)

    def _in_use(self) -> set[str]:
        """The numbers of the trees that are mounted in any namespace that we can see.

        An overlay's options keep the path that a layer had when it was mounted, ``ROOT/snapshots/<id>/``; a bind shows
        where its directory is now, ``ROOT/trash/<id>``, from the root of its filesystem.
        """
        root = os.fsencode(self._root)
        by_path = _numbers_below(root + b"/snapshots")
        within = mountinfo.path_within_filesystem(root)
        by_root = _numbers_below(within + b"/snapshots"), _numbers_below(within + b"/trash")
        used: set[str] = set()
        for entries in mountinfo.namespaces():
            for entry in entries:
                if entry.fstype == b"overlay":
                    found = [by_path.match(path) for path in layer_paths(entry.super_options)]
                else:
                    found = [pattern.match(entry.root) for pattern in by_root]
                used.update(match[1].decode() for match in found if match)
        return used


def _numbers_below(directory: bytes) -> re.Pattern[bytes]:
    return re.compile(re.escape(directory) + rb"/([0-9]+)(?:\.[0-9]+)?(?:/|$)")


class _Stopped(Exception):
    """The sweep was asked to stop, in the middle of a tree."""


class _Pace:
    """Called after every deleted file."""

    # Sleeping takes about 60 us too long, so that a rest is worth it only after a number of files.
    _BURST = 50

    def __init__(self, stop: Callable[[], bool], rate: float | None) -> None:
        self._stop = stop
        self._rate = rate
        self._count = 0

    def __call__(self) -> None:
        self._count += 1
        if self._count % self._BURST:
            return
        if self._stop():
            raise _Stopped
        if self._rate is not None:
            time.sleep(self._BURST / self._rate)
