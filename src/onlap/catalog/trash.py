"""Removed trees: moved away in one rename, deleted later, and never while somebody still reads or mounts them."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from onlap.catalog.locks import Held, open_directory
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
            OSError: a tree cannot be deleted, for another reason than that it is in use; the others were.
        """
        names = self.names()
        if not names:
            return Swept(0, 0)
        used = self._in_use()
        pace = _Pace(stop, rate)
        removed = 0
        failure: OSError | None = None
        top = open_directory(self._directory)
        try:
            for name in names:
                if stop():
                    break
                if name.partition(".")[0] in used:
                    continue
                try:
                    removed += self._delete(top, name, pace)
                except OSError as error:
                    failure = failure or error  # one that cannot be deleted must not keep the others
        except _Stopped:
            pass
        finally:
            os.close(top)
        if failure is not None:
            raise failure
        return Swept(removed, len(names) - removed)

    def _delete(self, top: int, name: str, pace: _Pace) -> bool:
        try:
            held = Held(name, dir_fd=top)
        except FileNotFoundError:
            return True  # another process was faster
        with held:
            # Readers hold it shared, by the open directory itself, so that the rename changed nothing for them.
            if not held.lock():
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

    def _in_use(self) -> set[str]:
        """The numbers of the trees that are mounted in any namespace that we can see.

        An overlay's options keep the path that a layer had when it was mounted, ``ROOT/snapshots/<id>/``; a bind shows
        where its directory is now, ``ROOT/trash/<id>``, from the root of its filesystem.
        """
        root = os.fsencode(self._root)
        below = mountinfo.mount_of(root)
        within = mountinfo.path_within(below, root)
        by_root = _numbers_below(within + b"/snapshots"), _numbers_below(within + b"/trash")
        used: set[str] = set()
        for namespace in mountinfo.namespaces():
            ours: dict[bytes, bool] = {root: True}
            for entry in namespace.entries:
                if entry.fstype == b"overlay":
                    for path in layer_paths(entry.super_options):
                        layer = _LAYER.match(path)
                        if layer and self._is_root(namespace.pid, layer[1], ours):
                            used.add(layer[2].decode())
                elif entry.device == below.device:
                    used.update(found[1].decode() for p in by_root if (found := p.match(entry.root)))
        return used

    def _is_root(self, pid: int, path: bytes, known: dict[bytes, bool]) -> bool:
        """Whether a path, as the process sees it, is our root, which may be bound to another place there."""
        if path not in known:
            try:
                known[path] = os.path.samefile(f"/proc/{pid}/root".encode() + path, self._root)
            except OSError:
                known[path] = False  # the process ended, or nothing is there any more
        return known[path]


_LAYER = re.compile(rb"(.*)/snapshots/([0-9]+)(?:/|$)", re.DOTALL)


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
