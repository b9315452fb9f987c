"""A tree once more, its files hard links of the first: what ``overlay`` makes each image's layer from.

Whoever writes into the copy must never change a file in place, since it is the original's too: not its content, nor
its mode, owner, times or xattrs. :class:`onlap.layers.apply.applier.Applier` does not: what an archive has is always a
new file, and a hard-link entry of an archive only makes a name. (Docker sets mode and owner also after a hard link,
and so changes the parent's file.)
"""

from __future__ import annotations

import errno
import os
import stat

from onlap.syscalls import files
from onlap.trees.copy import Copier
from onlap.trees.walk import OPEN_DIRECTORY, Descent, opened


def link_tree(source: str, target: str) -> None:
    """Make the empty directory ``target`` a copy of ``source``: directories made, everything else linked.

    Raises:
        OSError: it cannot be made.
    """
    with opened(source) as one, opened(target) as other:
        _Linker().tree(one, other)


class _Linker:
    def __init__(self) -> None:
        self._copier = Copier()

    def tree(self, source: int, target: int) -> None:
        """Without recursion, and with few directories open at a time: images may be deep."""
        sources, targets = Descent(source), Descent(target)
        stack = [_names(source)]
        try:
            while stack:
                if stack[-1]:
                    below = self._entry(sources.fd, targets.fd, stack[-1].pop())
                    if below is not None:
                        sources.enter(below[0])
                        targets.enter(below[1])
                        stack.append(_names(below[0]))
                    continue
                # Last, since what was made in it moved its time.
                self._copier.directory_attributes(sources.fd, targets.fd)
                stack.pop()
                if stack:
                    sources.leave()
                    targets.leave()
        finally:
            sources.close()
            targets.close()

    def _entry(self, source: int, target: int, name: str) -> tuple[int, int] | None:
        if not stat.S_ISDIR(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
            try:
                os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            except OSError as error:
                # The filesystem's limit of names for one file is reached (ext4: 65,000); a copy begins a new one.
                if error.errno != errno.EMLINK:
                    raise
                self._copier.entry(source, name, target, name)
            return None
        os.mkdir(name, 0o700, dir_fd=target)
        one = os.open(name, OPEN_DIRECTORY, dir_fd=source)
        try:
            return one, os.open(name, OPEN_DIRECTORY, dir_fd=target)
        except OSError:
            os.close(one)
            raise


def _names(fd: int) -> list[str]:
    return [entry.name for entry in files.list_directory(fd)]
