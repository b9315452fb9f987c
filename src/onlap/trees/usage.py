"""How much a tree takes: bytes and inodes, counted as containerd counts them."""

from __future__ import annotations

import os
from typing import NamedTuple

from onlap.trees.walk import opened, walk

# stat(2): st_blocks counts units of 512 bytes, whatever the filesystem's block size.
_BLOCK = 512


class Usage(NamedTuple):
    """What one layer takes, without its parents.

    Attributes:
        inodes: the number of inodes, each hard-linked file once, the top directory included.
        size: allocated bytes.
    """

    inodes: int = 0
    size: int = 0


def usage(top: str) -> Usage:
    """Measure the tree at ``top``; files that vanish meanwhile are passed over.

    Source: containerd v1.7.24, vendor/github.com/containerd/continuity/fs/du_unix.go.

    Raises:
        OSError: the tree cannot be read.
    """
    with opened(top) as fd:
        own = os.fstat(fd)
        inodes, size = 1, own.st_blocks * _BLOCK
        linked: set[tuple[int, int]] = set()
        for entry in walk(fd, ordered=False):
            status = entry.status
            # Only a file with several names can be met twice; the others need no place in the set.
            if status.st_nlink > 1:
                identity = (status.st_dev, status.st_ino)
                if identity in linked:
                    continue
                linked.add(identity)
            inodes += 1
            size += status.st_blocks * _BLOCK
        return Usage(inodes, size)
