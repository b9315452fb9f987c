"""Removed trees: moved away in one rename, deleted later, and never while they are still read or mounted."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from onlap.catalog.disk.pace import Pace, Stopped
from onlap.locks import Flock
from onlap.mounts.unmount import attempts
from onlap.overlayfs.options import layer_paths
from onlap.syscalls.files import exists
from onlap.trees.remove import remove
from onlap.trees.walk import opened

# rename(2) onto a directory that is not empty, or of a directory onto a file and the other way round.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)

# Files deleted between two rests.
_BURST = 50

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Swept(NamedTuple):
    """What a pass over the trash did.

    Attributes:
        removed: trees deleted.
        waiting: trees that are still mounted or read, which a later pass takes.
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
        self._hurry = False

    def put(self, directory: str, *, locked: bool = False) -> None:
        """Move a snapshot's directory away; does nothing if it does not exist.

        If there is no space to rename it, as on btrfs without space for metadata, it is deleted at once.

        Args:
            directory: its path.
            locked: whether the caller holds its lock.

        Raises:
            OSError: it can be neither moved nor deleted.
        """
        name = os.path.basename(directory)
        for attempt in range(1000):
            target = f"{self._directory}/{name}" + (f".{attempt}" if attempt else "")
            try:
                os.rename(directory, target)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM and self._delete_there(directory, locked):
                    return
                # An unfinished tree with the same number is there already.
                if error.errno not in _TAKEN:
                    raise
            else:
                return
        raise OSError(errno.EEXIST, "a thousand trees with one number are in the trash", directory)

    def _delete_there(self, directory: str, locked: bool) -> bool:
        above, name = os.path.split(directory)
        with opened(above) as top:
            if not locked:
                return name not in self._in_use() and self._delete(top, name, Pace(lambda: False, lambda: None, _BURST))
            remove(top, name)
        return True

    def names(self) -> list[str]:
        """What waits for deletion."""
        return os.listdir(self._directory)

    def is_empty(self) -> bool:
        """Whether nothing waits; reads one name at most."""
        with os.scandir(self._directory) as entries:
            return next(entries, None) is None

    def holds(self, identifier: int) -> bool:
        """Whether the tree that a snapshot with this id had waits for deletion."""
        return exists(f"{self._directory}/{identifier}")

    def sweep(self, *, stop: Callable[[], bool] = lambda: False, rate: float | None = None, wait: float = 0) -> Swept:
        """Delete the trees that are not in use.

        Args:
            stop: called between files; once it returns True, the rest is left for later.
            rate: files per second, as long as nobody waits for it; None for no limit.
            wait: how many seconds to wait for others who are deleting a tree; one locked for longer is left for later.

        Raises:
            OSError: a tree cannot be deleted for a reason other than being in use; the others were deleted.
        """
        names = self.names()
        if not names:
            return Swept(0, 0)
        used = self._in_use()
        if rate is not None:
            self._hurry = False
        pace = Pace(stop, lambda: None if self._hurry else rate, _BURST)
        removed = 0
        failure: OSError | None = None
        with opened(self._directory) as top, contextlib.suppress(Stopped):
            for name in names:
                if stop():
                    break
                if name.partition(".")[0] in used:
                    continue
                try:
                    removed += self._delete(top, name, pace, wait=wait)
                except OSError as error:
                    failure = failure or error  # one that cannot be deleted must not keep the others
        if failure is not None:
            raise failure
        return Swept(removed, len(names) - removed)

    def _delete(self, top: int, name: str, pace: Pace, *, wait: float = 0) -> bool:
        try:
            held = Flock(name, dir_fd=top)
        except FileNotFoundError:
            return True  # another process was faster
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            # Not a directory: it cannot be mounted or read as a tree, however it got here.
            os.unlink(name, dir_fd=top)
            return True
        with held:
            # Readers hold a shared lock on the open directory itself, which the rename did not affect.
            if not held.lock():
                if not wait or held.lock(shared=True):
                    return False
                # It is being deleted, perhaps by our own background work, which is slow.
                self._hurry = True
                if not any(held.lock() for _ in attempts(wait)):
                    return False
                if not held.is_at(f"{self._directory}/{name}"):
                    return True
            try:
                remove(top, name, pace=pace)
            except OSError as error:
                # EXDEV, EBUSY: mounted since the check.
                if error.errno in (errno.EXDEV, errno.EBUSY):
                    return False
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise
                return False
            return True

    def _in_use(self) -> set[str]:
        """The numbers of the trees that are mounted in any namespace that we can see and trust.

        An overlay's options keep the path that a layer had when it was mounted, ``ROOT/snapshots/<id>/``; a bind shows
        where its directory is now, ``ROOT/trash/<id>``, relative to the root of its filesystem.
        """
        from onlap.mounts import mountinfo, namespaces

        root = os.fsencode(self._root)
        by_path = _numbers_below(root)
        # If no table shows our root, no other mount can be recognized as one of it: no device is called "".
        place = mountinfo.place_of(self._root) or mountinfo.Place(b"", root)
        by_place = _numbers_below(place.path)
        used: set[str] = set()

        def note(found: re.Match[bytes] | None) -> bool:
            if found:
                used.add(found[1].decode())
            return found is not None

        for text in namespaces.tables():
            table = mountinfo.Table(text)
            for entry in mountinfo.parse(text, *_NEEDLES):
                if entry.fstype != b"overlay":
                    if entry.device == place.device:
                        note(by_place.match(entry.root))
                    continue
                for path in layer_paths(entry.super_options):
                    if note(by_path.match(path)) or note(re.fullmatch(_RELATIVE, path)):
                        continue
                    # Our root may be bound to another path there.
                    if b"/snapshots/" in path and path.startswith(b"/"):
                        place_there = table.place(path)
                        if place_there is not None and place_there.device == place.device:
                            note(by_place.match(place_there.path))
        return used


_NEEDLES = (b" - overlay ", b"/snapshots/", b"/trash/")

# A layer that was given to mount(2) relative to ROOT/snapshots, since all paths together did not fit into its page
# (containerd does so too). Whose it is cannot be told; waiting costs less than deleting a layer that is in use.
# Compiled at its first use, as most commands have none.
_RELATIVE = rb"([0-9]+)/(?:fs|work)"


def _numbers_below(root: bytes) -> re.Pattern[bytes]:
    return re.compile(re.escape(root.rstrip(b"/")) + rb"/(?:snapshots|trash)/([0-9]+)(?:\.[0-9]+)?(?:/|$)")
