"""Walking a tree by directory descriptors, in the order of the names' bytes, without recursion.

Names are opened one component at a time relative to an open directory, so that a rename or a symlink put in the way
while we walk cannot lead us out of the tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Entry(NamedTuple):
    """A file met on the way.

    Attributes:
        path: from the top of the walk, with ``/`` between names and none before the first.
        name: its last component; relative to ``dir_fd``, which is open until the walk goes on.
        dir_fd: the directory that holds it.
        status: its own, not that of what a symlink points to.
    """

    path: str
    name: str
    dir_fd: int
    status: os.stat_result


def walk(top: int, *, descend: Callable[[Entry], bool] | None = None, ordered: bool = True) -> Iterator[Entry]:
    """Every file below ``top``, a directory before what is in it; ``top`` itself is not among them.

    Args:
        top: a descriptor of a directory, open for reading; left open.
        descend: asked for every directory whether to go into it.
        ordered: sort each directory by its names' bytes; else they come as the filesystem gives them.

    Raises:
        OSError: a directory cannot be read. A file that vanishes while its directory is read is passed over.
    """
    stack: list[tuple[int, str, Iterator[os.DirEntry[str]]]] = [(top, "", _entries(top, ordered))]
    try:
        while stack:
            dir_fd, prefix, entries = stack[-1]
            for listed in entries:
                try:
                    status = listed.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                entry = Entry(prefix + listed.name, listed.name, dir_fd, status)
                yield entry
                if listed.is_dir(follow_symlinks=False) and (descend is None or descend(entry)):
                    try:
                        child = os.open(listed.name, OPEN_DIRECTORY, dir_fd=dir_fd)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                    stack.append((child, entry.path + "/", _entries(child, ordered)))
                    break
            else:
                stack.pop()
                if dir_fd != top:
                    os.close(dir_fd)
    finally:
        for dir_fd, _, _ in stack:
            if dir_fd != top:
                os.close(dir_fd)


def _entries(fd: int, ordered: bool) -> Iterator[os.DirEntry[str]]:
    with os.scandir(fd) as listing:
        entries = list(listing)
    if ordered:
        entries.sort(key=lambda entry: os.fsencode(entry.name))
    return iter(entries)


def path_of(dir_fd: int, name: str) -> str:
    """A path for the calls that take no ``dir_fd`` (the xattr ones); valid while ``dir_fd`` is open."""
    return f"/proc/self/fd/{dir_fd}/{name}"
