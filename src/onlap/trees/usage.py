"""The disk usage of a tree: bytes and inodes, counted as containerd does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap.trees.walk import opened, walk

# stat(2): st_blocks counts units of 512 bytes, whatever the filesystem's block size.
_BLOCK = 512


class Usage(NamedTuple):
    """The disk usage of one layer, without its parents.

    Attributes:
        inodes: the number of inodes, including the top directory; a hard-linked file counts once.
        size: allocated bytes.
    """

    inodes: int = 0
    size: int = 0


def usage(top: str) -> Usage:
    """Measure the tree at ``top``; files that vanish meanwhile are skipped.

    Source: containerd v1.7.24, vendor/github.com/containerd/continuity/fs/du_unix.go.

    Raises:
        OSError: the tree cannot be read.
    """
    with opened(top) as fd:
        count, blocks = 1, os.fstat(fd).st_blocks
        for status in inodes(fd):
            count += 1
            blocks += status.st_blocks
        return Usage(count, blocks * _BLOCK)


def inodes(top: int) -> Iterator[os.stat_result]:
    """The status of every file below an open directory, in no order; that of a file with several names only once.

    Raises:
        OSError: the tree cannot be read.
    """
    linked: set[tuple[int, int]] = set()
    for entry in walk(top, ordered=False):
        status = entry.status
        # Only a file with several names can be met twice; the others need no place in the set.
        if status.st_nlink > 1:
            identity = (status.st_dev, status.st_ino)
            if identity in linked:
                continue
            linked.add(identity)
        yield status
