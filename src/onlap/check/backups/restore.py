"""A new root from a backup, as a function that loads what it needs (:mod:`onlap.check.backups.restoring`)."""

from __future__ import annotations

from typing import BinaryIO

from onlap.arguments import StrPath
from onlap.boundary import public
from onlap.check.backups.summary import Backup
from onlap.progress import Callback


@public
def restore(source: StrPath | BinaryIO, root: StrPath, *, progress: Callback | None = None) -> Backup:
    """Make a new root from a backup that :meth:`Store.backup` wrote.

    Everything is as it was: ids, owners, parents, labels and times, images, and every file of every layer, which is
    compared with its manifest while it is written. After an error nothing of the root is there.

    Args:
        source: a path, or a binary file; a tar, plain or compressed with gzip, zstd, bzip2 or xz.
        root: a new or empty directory, on a filesystem and for a user where a root of this kind works.
        progress: called with the bytes read, at most ten times per second.

    Raises:
        InvalidArgument: it is not a backup, or an attack; the error names the entry.
        FailedPrecondition: the directory is not empty; or the root was another user's, or its overlays do not work
            there.
        DataLoss: the archive is truncated or damaged; the error names the file.
        Unavailable: another process restores a backup there.
        OnlapError: of another kind, for an error of the filesystem.
    """
    from onlap.check.backups.restoring import restore

    return restore(source, root, progress)
